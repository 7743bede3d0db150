"""Parse `py_executable` strings into specs: what a venv must contain, before it is resolved.

Three forms are accepted: the path of an interpreter, which is used unchanged; a `uv run ...` string whose options
select a project, its extras and its groups; and the path of a script with inline metadata, which lists the packages.
Parsing does not call uv. It reads no files except scripts and those that `--with-requirements` names.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from packaging.utils import canonicalize_name

from nemo_rl import settings
from nemo_rl.errors import InvalidPyExecutableError, RuntimeEnvError
from nemo_rl.secrets import mask_secrets
from nemo_rl.venvs.planning.requirements import (
    packages_of,
    read_requirements_file,
    requirements_of_field,
)
from nemo_rl.venvs.planning.scripts import is_script, script_metadata

_FLAGS = ("--locked", "--frozen", "--all-extras", "--no-default-groups", "--all-packages")
_VALUED = ("--extra", "--group", "--with", "--with-requirements", "--python", "--directory", "--project", "--package")
_EXCLUSIVE = (("--locked", "--frozen"), ("--package", "--all-packages"))
_REPEATABLE = ("--extra", "--group", "--with", "--with-requirements")
ACCEPTED_OPTIONS: tuple[str, ...] = tuple(sorted(_FLAGS + _VALUED))

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class InterpreterSpec:
    """Selects an existing interpreter, with or without an additive venv over it.

    Attributes:
        path: absolute path of the interpreter.
        requirements: requirements-file lines of an additive venv; empty to use the interpreter itself.
    """

    path: str
    requirements: tuple[str, ...] = ()

    def with_packages(self, requirements: Iterable[str]) -> InterpreterSpec:
        """Return this spec with an additive venv of `requirements` (requirements-file lines)."""
        return replace(self, requirements=_merged(self.requirements, requirements))

    @property
    def base(self) -> InterpreterSpec:
        """The spec without its additive requirements."""
        return replace(self, requirements=())

    def __str__(self) -> str:
        return " ".join([self.path, *_with_options(self.requirements)])


@dataclass(frozen=True)
class VenvSpec:
    """Selects packages of a uv project.

    Attributes:
        project: absolute path of a directory in the project; uv finds the project, and the workspace around it.
        package: normalised name of the workspace member to install; None for the project itself.
        all_packages: install every member of the workspace.
        script: absolute path of a script with inline metadata (PEP 723), whose dependencies are installed instead of a
            project; `project` is then its directory.
        extras, groups: normalised, sorted names of the selected extras and dependency groups.
        all_extras: whether every extra of the project is selected.
        default_groups: whether the project's `tool.uv.default-groups` are selected.
        frozen: use `uv.lock` without checking that it matches `pyproject.toml`.
        python: value of `--python`, a version or a path; None for the driver's Python.
        requirements: `--with` requirements, as requirements-file lines of an additive venv.
    """

    project: str
    extras: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    all_extras: bool = False
    default_groups: bool = True
    frozen: bool = False
    python: str | None = None
    requirements: tuple[str, ...] = ()
    package: str | None = None
    all_packages: bool = False
    script: str | None = None

    def with_packages(self, requirements: Iterable[str]) -> VenvSpec:
        """Return this spec with an additive venv of `requirements` (requirements-file lines)."""
        return replace(self, requirements=_merged(self.requirements, requirements))

    @property
    def base(self) -> VenvSpec:
        """The spec without its additive requirements."""
        return replace(self, requirements=())

    def selection(self) -> list[str]:
        """Return the options of uv that select members, extras and groups."""
        options = ["--package", self.package] if self.package is not None else []
        options += ["--all-packages"] if self.all_packages else []
        options += ["--all-extras"] if self.all_extras else []
        options += [word for extra in self.extras for word in ("--extra", extra)]
        options += [word for group in self.groups for word in ("--group", group)]
        if not self.default_groups:
            options.append("--no-default-groups")
        return options

    def __str__(self) -> str:
        if self.script is not None:
            return " ".join([shlex.quote(self.script), *_with_options(self.requirements)])
        words = ["uv", "run", "--frozen" if self.frozen else "--locked", "--project", shlex.quote(self.project)]
        words += self.selection()
        if self.python is not None:
            words += ["--python", shlex.quote(self.python)]
        return " ".join([*words, *_with_options(self.requirements)])


Spec = VenvSpec | InterpreterSpec


def parse_py_executable(text: str) -> Spec:
    """Parse a `py_executable`.

    Relative paths are relative to the current directory. Without `--project` and `--directory` the project is
    `settings.project_root()`. `--locked` is the default, so that a worker's venv never changes a lock. `--directory`
    only locates the project.

    Raises:
        InvalidPyExecutableError: names the option or word that is not accepted.

    Example:
        >>> spec = parse_py_executable("uv run --extra vllm --project /p")
        >>> spec.extras
        ('vllm',)
        >>> str(spec)
        'uv run --locked --project /p --extra vllm'
    """
    if not isinstance(text, str):
        raise InvalidPyExecutableError(f"py_executable must be a string, not {type(text).__name__}: {text!r}.")
    try:
        return _parse(text)
    except InvalidPyExecutableError as error:
        raise InvalidPyExecutableError(mask_secrets(str(error))) from None


def _parse(text: str) -> Spec:
    if not text.isprintable():
        raise InvalidPyExecutableError(f"py_executable {text!r} contains control characters.")
    if os.path.isabs(text.strip()) and os.access(text.strip(), os.X_OK):
        return _parse_path(text.strip())  # the path may contain spaces
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InvalidPyExecutableError(f"py_executable {text!r} cannot be parsed: {error}.") from None
    if words[:3] == ["uv", "run", "--script"] and len(words) == 4:
        return _parse_path(os.path.abspath(words[3]))
    if words[:2] == ["uv", "run"]:
        return _parse_uv_run(text, words[2:])
    if len(words) == 1 and "/" in words[0] and words[0] != "uv":
        return _parse_path(os.path.abspath(words[0]))
    raise InvalidPyExecutableError(
        f"py_executable {text!r} is neither the path of an interpreter (such as sys.executable) or script nor a "
        f"`uv run ...` string. A path must contain a '/' and, if it contains spaces, quotes around it; options after "
        "the path are not accepted."
    )


def _parse_path(path: str) -> Spec:
    if script_metadata(path) is not None:
        return VenvSpec(project=os.path.dirname(path), script=path)
    if is_script(path):
        raise InvalidPyExecutableError(
            f"py_executable {path!r} is not an interpreter, but a script without inline metadata: it has no "
            "`# /// script` block. Add one with `uv add --script`, or give the path of an interpreter."
        )
    return InterpreterSpec(path)


def spec_from_runtime_env(runtime_env: Mapping[str, object], base: str | Spec) -> Spec:
    """Return the spec of an additive venv for the `pip` or `uv` field of a Ray `runtime_env`.

    Ray handles the other fields; this function ignores them.

    Args:
        base: the py_executable or spec that the field adds packages to; returned if `runtime_env` has neither field.

    Raises:
        RuntimeEnvError: both fields are given, or one is malformed.
    """
    spec = parse_py_executable(base) if isinstance(base, str) else base
    fields = [name for name in ("pip", "uv") if runtime_env.get(name) is not None]
    if len(fields) == 2:
        raise RuntimeEnvError("runtime_env fields 'pip' and 'uv' cannot both be given; list all packages in one.")
    return spec.with_packages(requirements_of_field(fields[0], runtime_env[fields[0]])) if fields else spec


def _parse_uv_run(text: str, words: list[str]) -> VenvSpec:
    flags: set[str] = set()
    values: dict[str, list[str]] = {option: [] for option in _VALUED}
    for option, value in _options(text, words):
        if value is None:
            flags.add(option)
        elif values[option] and option not in _REPEATABLE:
            raise InvalidPyExecutableError(f"py_executable {text!r} gives {option} twice.")
        else:
            values[option].append(value)
    given = flags | {option for option in _VALUED if values[option]}
    for one, other in _EXCLUSIVE:
        if {one, other} <= given:
            raise InvalidPyExecutableError(f"py_executable {text!r} gives both {one} and {other}; choose one.")
    packages = _names(text, "--package", values["--package"])
    directory = os.path.abspath(os.path.expanduser("".join(values["--directory"])))
    return VenvSpec(
        project=_project(directory if values["--directory"] else None, values["--project"]),
        extras=_names(text, "--extra", values["--extra"]),
        groups=_names(text, "--group", values["--group"]),
        all_extras="--all-extras" in flags,
        default_groups="--no-default-groups" not in flags,
        frozen="--frozen" in flags,
        python=values["--python"][0] if values["--python"] else None,
        requirements=_requirements(text, values["--with"], values["--with-requirements"], directory),
        package=packages[0] if packages else None,
        all_packages="--all-packages" in flags,
    )


def _options(text: str, words: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield (option, value or None for a flag). Raises for every word that is not an accepted option."""
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option in _FLAGS and not equals:
            yield option, None
        elif option in _VALUED:
            if not equals:
                value = next(rest, "")
            if not value.strip() or value.startswith("-"):
                raise InvalidPyExecutableError(f"py_executable {text!r}: {option} needs a value.")
            yield option, value
        else:
            culprit = f"option {option}" if word.startswith("-") else f"the word {word!r}"
            raise InvalidPyExecutableError(
                f"py_executable {text!r}: {culprit} is not accepted after `uv run`. "
                f"Accepted: {', '.join(ACCEPTED_OPTIONS)}."
            )


def _project(directory: str | None, project: list[str]) -> str:
    if directory is None and not project:
        return str(settings.project_root())
    # uv changes to --directory first, so all relative paths are relative to it.
    return os.path.abspath(os.path.join(directory or "", *project))


def _names(text: str, option: str, values: list[str]) -> tuple[str, ...]:
    for value in values:
        if not _NAME.fullmatch(value):
            raise InvalidPyExecutableError(f"py_executable {text!r}: {option} {value!r} is not a valid name.")
    return tuple(sorted({canonicalize_name(value) for value in values}))


def _requirements(text: str, packages: list[str], files: list[str], directory: str) -> tuple[str, ...]:
    try:
        lines = packages_of([item.strip() for value in packages for item in _split_list(value)], directory)
        for file in files:
            lines += read_requirements_file(file, directory)
    except RuntimeEnvError as error:
        raise InvalidPyExecutableError(f"py_executable {text!r}: {error}") from error
    return _merged((), lines)


def _split_list(value: str) -> list[str]:
    """Split `a,b` into two requirements, but not at a comma inside `a>=1,<2` or `a[x,y]`."""
    return [item for item in re.split(r",(?=\s*[A-Za-z_./])(?![^\[]*\])", value) if item.strip()]


def _merged(old: tuple[str, ...], new: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*old, *packages_of(list(new))]))


def _with_options(requirements: tuple[str, ...]) -> list[str]:
    return [word for line in requirements for word in ("--with", shlex.quote(line))]
