"""Read lists of requirements: `--with`, requirements files, and the `pip` and `uv` fields of a Ray `runtime_env`.

Each becomes a flat list of requirements-file lines with absolute paths, so that it has the same meaning on every node
and in every working directory.
"""

from __future__ import annotations

import logging
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement

from nemo_rl import settings
from nemo_rl.errors import RuntimeEnvError
from nemo_rl.secrets import mask_secrets
from nemo_rl.venvs.planning.markers import parse_requirement
from nemo_rl.venvs.planning.scripts import index_options_of, script_metadata

logger = logging.getLogger(__name__)

_FLAGS = ("--no-index", "--pre")
_LOCATIONS = ("--index-url", "--extra-index-url", "--find-links", "--editable")
_NAMES = ("--no-binary", "--only-binary")
_INDEX_OPTIONS = (*_FLAGS, *_LOCATIONS[:-1], *_NAMES, "--index", "--default-index")
_ALIASES = {
    "-i": "--index-url",
    "-f": "--find-links",
    "-e": "--editable",
    "--index": "--extra-index-url",  # uv accepts these two on its command line, but not in a file
    "--default-index": "--index-url",
}
# Options that uv ignores in a file. They do not change which packages are installed.
_WITHOUT_EFFECT = ("--prefer-binary", "--require-hashes", "--trusted-host", "--use-feature")
# A line of a constraints file becomes this option with a requirement: the file may not exist on another node.
_CONSTRAINT = "--constrain"
_FILE_OPTION = re.compile(r"(-r|--requirement|-c|--constraint)[\s=]*(.+)")
_VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)\}")  # as in pip
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_NOT_LISTS = ("pyproject.toml", "setup.py", "setup.cfg")
_IGNORED_FIELDS = ("pip_version", "uv_version")
_CHECK_FIELDS = ("pip_check", "uv_check")
_OPTION_FIELDS = ("pip_install_options", "uv_pip_install_options")
_MAX_DEPTH = 10


def packages_of(lines: Iterable[str], base_dir: str | None = None) -> list[str]:
    """Check requirements-file lines and make their paths absolute.

    Args:
        base_dir: the directory that paths are relative to; default: the current directory.

    Raises:
        RuntimeEnvError: names the line that is not a requirement.
    """
    result: list[str] = []
    for line in lines:
        if not isinstance(line, str) or not line.strip() or not line.isprintable():
            raise RuntimeEnvError(f"{line!r} is not a requirement: expected text such as 'packaging==23.2'.")
        result += _read_line(line.strip(), (base_dir or os.getcwd(),), _MAX_DEPTH)
    return result


def read_requirements_file(path: str | os.PathLike[str], base_dir: str | None = None) -> list[str]:
    """Read a requirements file as pip and uv do, or the inline metadata of a script; paths in the lines are absolute.

    Included files (`-r`), constraints files (`-c`) and `--find-links` are relative to the file that names them. Paths
    of packages are relative to the current directory; those that do not exist there, to the file.

    Args:
        base_dir: used instead of the current directory.
    """
    base_dir = base_dir or os.getcwd()
    return _read(Path(os.path.normpath(os.path.join(base_dir, os.path.expanduser(path)))), base_dir, _MAX_DEPTH)


def requirements_of_field(name: str, value: object) -> list[str]:
    """Return the requirements of the `pip` or `uv` field of a `runtime_env`.

    Args:
        name: name of the field.
        value: a list of requirements, a mapping with `packages`, or the path of a requirements file. An empty list adds
            no packages, as in Ray.

    Raises:
        RuntimeEnvError: names the field and the error.
    """
    if isinstance(value, str | os.PathLike):
        return read_requirements_file(value)
    if isinstance(value, list | tuple):
        return packages_of(value)
    if not isinstance(value, Mapping):
        raise RuntimeEnvError(
            f"runtime_env field {name!r} must be a list of requirements, a mapping with 'packages', or the path of a "
            f"requirements file; got {type(value).__name__}."
        )
    lines: list[str] = []
    for key, item in value.items():
        if key == "packages":
            lines = requirements_of_field(name, item) if not isinstance(item, Mapping) else _refuse(name, key)
        elif key in _OPTION_FIELDS:
            lines += _install_options(name, key, item)
        elif key in _IGNORED_FIELDS:
            continue  # the installer that Ray would use; the engine always uses its own uv
        elif not (key in _CHECK_FIELDS and item is False):
            _refuse(name, key)
    return lines if any(not is_option(line) for line in lines) else []


def _refuse(name: str, key: object) -> list[str]:
    known = ["packages", *_OPTION_FIELDS, *(f"{field}=False" for field in _CHECK_FIELDS), *_IGNORED_FIELDS]
    raise RuntimeEnvError(
        f"runtime_env field {name!r}: {key!r} is not supported for an additive venv. Accepted: {', '.join(known)}."
    )


def _install_options(name: str, key: str, options: object) -> list[str]:
    """Convert installer options that choose an index to requirements-file lines; raise for other options."""
    if not isinstance(options, list | tuple) or not all(isinstance(option, str) for option in options):
        raise RuntimeEnvError(f"runtime_env field {name!r}: {key!r} must be a list of strings.")
    lines: list[str] = []
    words = iter([part for option in options for part in option.split(None, 1)])
    for word in words:
        option, equals, value = word.partition("=")
        if option == "--no-cache-dir" or option == "--no-cache":
            continue
        if _ALIASES.get(option, option) not in _INDEX_OPTIONS:
            raise RuntimeEnvError(
                f"runtime_env field {name!r}: {key!r} does not accept {option!r}; accepted: "
                f"{', '.join(_INDEX_OPTIONS)}."
            )
        if option in _FLAGS:
            lines.append(option)
        else:
            lines.append(f"{option} {value if equals else next(words, '')}".strip())
    return packages_of(lines)


def _read(path: Path, base_dir: str, depth: int, *, as_constraints: bool = False) -> list[str]:
    if depth == 0:
        raise RuntimeEnvError(f"requirements file {path} includes files more than {_MAX_DEPTH} levels deep.")
    if not path.is_file():
        raise RuntimeEnvError(f"requirements file {path} does not exist.")
    if path.name in _NOT_LISTS:
        raise RuntimeEnvError(f"{path} is not a list of requirements. Use `--project {path.parent}` for its packages.")
    if (metadata := script_metadata(path)) is not None:
        return _lines_of_script(path, metadata)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise RuntimeEnvError(f"requirements file {path} cannot be read: {error}.") from None
    lines: list[str] = []
    for number, line in _logical_lines(text):
        try:
            checked = _read_line(line, (base_dir, str(path.parent)), depth)
        except RuntimeEnvError as error:
            raise RuntimeEnvError(f"requirements file {path}, line {number}: {error}") from None
        lines += [f"{_CONSTRAINT} {item}" if as_constraints and not is_option(item) else item for item in checked]
    return lines


def _read_line(line: str, base_dirs: tuple[str, ...], depth: int) -> list[str]:
    """Return a line with absolute paths, or the lines of the file that it includes.

    Args:
        base_dirs: directories that paths of packages are relative to: the first in which the package exists, else the
            last. Other paths are relative to the last.
    """
    include = _FILE_OPTION.fullmatch(line)
    if include is None:
        return _checked_line(line, base_dirs)
    if _URL.match(include[2]):
        raise RuntimeEnvError(f"{line!r} names a URL; download the file and name its path.")
    file = Path(os.path.normpath(os.path.join(base_dirs[-1], os.path.expanduser(_unquoted(include[2])))))
    return _read(file, base_dirs[0], depth - 1, as_constraints=include[1] in ("-c", "--constraint"))


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line, without comments, with continued lines joined and variables replaced."""
    start, parts = 0, []
    for number, raw in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*$", "", raw)
        continues = line == raw and line.endswith("\\")
        parts.append(f"{line[:-1]} " if continues else line)
        start = start or number
        if continues:
            continue
        joined = "".join(parts).strip()
        if joined:
            yield start, _VARIABLE.sub(lambda match: settings.snapshot().get(match[1], match[0]), joined)
        start, parts = 0, []
    if "".join(parts).strip():
        yield start, "".join(parts).strip()


def _lines_of_script(path: Path, metadata: Mapping[str, Any]) -> list[str]:
    uv_settings = metadata.get("tool", {}).get("uv", {})
    if "sources" in uv_settings:
        raise RuntimeEnvError(
            f"{path} has `tool.uv.sources`, which a list of requirements cannot express. Give the script itself as "
            "py_executable."
        )
    return [
        *index_options_of(uv_settings, str(path.parent)),
        *packages_of(metadata.get("dependencies", []), str(path.parent)),
    ]


def _checked_line(line: str, base_dirs: tuple[str, ...]) -> list[str]:
    """Return a line with absolute paths; nothing for an option without effect."""
    if line.startswith("-"):
        return _checked_option(line, base_dirs)
    if _URL.match(line):
        return [line]
    if is_path(line):
        return [_absolute(line, base_dirs)]
    requirement = re.sub(r"\s--hash[=\s]\S+", "", line)
    try:
        url = parse_requirement(requirement).url
    except InvalidRequirement as error:
        reason = str(error).splitlines()[0]
        raise RuntimeEnvError(mask_secrets(f"{line!r} is not a requirement: {reason}.")) from None
    if url is not None and ":" not in url:  # a relative path
        return [line.replace(url, f"file://{urllib.parse.quote(_absolute(url, base_dirs))}", 1)]
    return [line]


def _checked_option(line: str, base_dirs: tuple[str, ...]) -> list[str]:
    match = re.match(r"(--?[A-Za-z-]+)(?:[\s=]+(.*))?$", line)
    option = _ALIASES.get(match[1], match[1]) if match else line
    value = _unquoted(match[2] or "") if match else ""
    if option in _WITHOUT_EFFECT:
        logger.warning("the option %s in a list of requirements is ignored, as by uv", option)
        return []
    if option not in (*_FLAGS, *_LOCATIONS, *_NAMES, _CONSTRAINT):
        raise RuntimeEnvError(f"the option {option!r} is not accepted in a list of requirements.")
    if option in _FLAGS:
        return [option]
    if not value:
        raise RuntimeEnvError(f"the option {option!r} needs a value.")
    if option == _CONSTRAINT:
        return [f"{option} {constraint}" for constraint in _checked_line(value, base_dirs)]
    if option in _LOCATIONS and not _URL.search(value):
        value = _absolute(value, base_dirs if option == "--editable" else base_dirs[-1:])
    return [f"{option} {value}"]


def _unquoted(value: str) -> str:
    value = value.strip()
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def is_option(line: str) -> bool:
    """Return whether a line is an option instead of naming a package to install."""
    return line.startswith("--") and not line.startswith("--editable")


def is_index_option(line: str) -> bool:
    """Return whether a line decides where packages are installed from, and not their versions."""
    return is_option(line) and line != "--pre" and not line.startswith(_CONSTRAINT)


def split_constraints(lines: Iterable[str]) -> tuple[list[str], list[str]]:
    """Separate the constraints, as plain requirements, from the other lines; return (others, constraints)."""
    prefix = f"{_CONSTRAINT} "
    lines = list(lines)
    constraints = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
    return [line for line in lines if not line.startswith(prefix)], constraints


def is_path(line: str) -> bool:
    """Return whether a requirement is the path of a wheel, archive or project directory."""
    path = re.split(r"[\s;@]", line, maxsplit=1)[0]
    return path.startswith((".", "~")) or "/" in path or path.endswith(_ARCHIVES)


def _absolute(path: str, base_dirs: tuple[str, ...]) -> str:
    """Make a path absolute, with what follows it: extras, a marker, hashes."""
    path = os.path.expanduser(path)
    place = re.split(r"\[|\s", path, maxsplit=1)[0]
    base_dir = next((base for base in base_dirs if os.path.exists(os.path.join(base, place))), base_dirs[-1])
    return os.path.normpath(os.path.join(base_dir, path))
