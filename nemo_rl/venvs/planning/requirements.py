"""Read lists of requirements: `--with`, requirements files, and the `pip` and `uv` fields of a Ray `runtime_env`.

Each becomes a flat list of requirements-file lines with absolute paths, so that it has the same meaning on every node
and in every working directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from nemo_rl.errors import RuntimeEnvError
from nemo_rl.secrets import mask_secrets

_INDEX_OPTIONS = (
    "--index-url",
    "--extra-index-url",
    "--find-links",
    "--no-index",
    "--pre",
    "--index",
    "--default-index",
)
_SHORT_OPTIONS = {"-i": "--index-url", "-f": "--find-links", "-e": "--editable"}
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
        result.append(_checked_line(line.strip(), base_dir or os.getcwd()))
    return result


def read_requirements_file(path: str | os.PathLike[str]) -> list[str]:
    """Read a requirements file and the files that it includes (`-r`); the paths in the lines are absolute."""
    return _read(Path(os.path.abspath(os.path.expanduser(path))), _MAX_DEPTH)


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
        option = _SHORT_OPTIONS.get(option, option)
        if option == "--no-cache-dir" or option == "--no-cache":
            continue
        if option not in _INDEX_OPTIONS:
            raise RuntimeEnvError(
                f"runtime_env field {name!r}: {key!r} does not accept {option!r}; accepted: "
                f"{', '.join(_INDEX_OPTIONS)}."
            )
        if option in ("--no-index", "--pre"):
            lines.append(option)
        else:
            lines.append(f"{option} {value if equals else next(words, '')}".strip())
    return packages_of(lines)


def _read(path: Path, depth: int) -> list[str]:
    if depth == 0:
        raise RuntimeEnvError(f"requirements file {path} includes files more than {_MAX_DEPTH} levels deep.")
    if not path.is_file():
        raise RuntimeEnvError(f"requirements file {path} does not exist.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RuntimeEnvError(f"requirements file {path} cannot be read: {error}.") from None
    lines: list[str] = []
    for raw in re.sub(r"\\\r?\n", " ", text).splitlines():
        line = re.sub(r"(^|\s)#.*$", "", raw).strip()
        include = re.match(r"(?:-r|--requirement)[\s=]*(.+)$", line)
        if include:
            lines += _read((path.parent / include[1].strip()).absolute(), depth - 1)
        elif line:
            try:
                lines += packages_of([line], str(path.parent))
            except RuntimeEnvError as error:
                raise RuntimeEnvError(f"requirements file {path}: {error}") from None
    return lines


def _checked_line(line: str, base_dir: str) -> str:
    if line.startswith("-"):
        return _checked_option(line, base_dir)
    if is_path(line):
        return _absolute(line, base_dir)
    requirement = re.sub(r"\s--hash[=\s]\S+", "", line)
    try:
        Requirement(requirement)
    except InvalidRequirement as error:
        reason = str(error).splitlines()[0]
        raise RuntimeEnvError(mask_secrets(f"{line!r} is not a requirement: {reason}.")) from None
    return line


def _checked_option(line: str, base_dir: str) -> str:
    match = re.match(r"(--?[A-Za-z-]+)(?:[\s=]+(.*))?$", line)
    option = _SHORT_OPTIONS.get(match[1], match[1]) if match else line
    value = (match[2] or "").strip() if match else ""
    if option not in (*_INDEX_OPTIONS, "--editable"):
        raise RuntimeEnvError(f"the option {option!r} is not accepted in a list of requirements.")
    if option in ("--no-index", "--pre"):
        return option
    if not value:
        raise RuntimeEnvError(f"the option {option!r} needs a value.")
    if "://" not in value:
        value = _absolute(value, base_dir)
    return f"{option} {value}"


def is_option(line: str) -> bool:
    """Return whether a line configures an index instead of naming a package."""
    return line.startswith("--") and not line.startswith("--editable")


def is_path(line: str) -> bool:
    """Return whether a requirement is the path of a wheel, archive or project directory."""
    return line.startswith((".", "/", "~")) or (line.endswith((".whl", ".tar.gz", ".zip")) and "@" not in line)


def _absolute(path: str, base_dir: str) -> str:
    return os.path.normpath(os.path.join(base_dir, os.path.expanduser(path)))
