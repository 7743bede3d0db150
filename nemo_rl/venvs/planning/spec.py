"""What a venv must contain, as the user says it: `py_executable` strings, parsed.

Two forms are accepted: the path of an interpreter (used as it is), and a `uv run ...` string whose options
say which extras and groups of which project the venv holds. Nothing here touches the disk or calls uv, apart from
making relative paths absolute and reading the files that `--with-requirements` names.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from nemo_rl import settings
from nemo_rl.errors import InvalidPyExecutableError, RuntimeEnvError
from nemo_rl.secrets import mask_secrets
from nemo_rl.venvs.planning.requirements import (
    normalized_name,
    packages_of,
    read_requirements_file,
    requirements_of_field,
)

_FLAGS = ("--locked", "--frozen", "--all-extras", "--no-default-groups")
_VALUED = ("--extra", "--group", "--with", "--with-requirements", "--python", "--directory", "--project")
_REPEATABLE = ("--extra", "--group", "--with", "--with-requirements")
ACCEPTED_OPTIONS: tuple[str, ...] = tuple(sorted(_FLAGS + _VALUED))

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class InterpreterSpec:
    """An interpreter that exists already.

    Attributes:
        path: absolute path of the interpreter.
        requirements: lines laid over it in an additive venv; empty means: use the interpreter itself.
    """

    path: str
    requirements: tuple[str, ...] = ()

    def with_packages(self, requirements: Iterable[str]) -> InterpreterSpec:
        """The same interpreter with `requirements` (requirements-file lines) laid over it."""
        return replace(self, requirements=_merged(self.requirements, requirements))

    @property
    def base(self) -> InterpreterSpec:
        """The spec without its additive requirements."""
        return replace(self, requirements=())

    def __str__(self) -> str:
        return " ".join([self.path, *_with_options(self.requirements)])


@dataclass(frozen=True)
class VenvSpec:
    """A venv of a uv project.

    Attributes:
        project: absolute path of the project's directory.
        extras, groups: normalised, sorted names of the extras and dependency groups it holds.
        all_extras: every extra of the project.
        default_groups: also the project's `tool.uv.default-groups`.
        frozen: take `uv.lock` as it is, without checking that it matches `pyproject.toml`.
        python: what `--python` asked for (a version or a path); None means the driver's own Python.
        requirements: `--with` requirements, laid over the project's packages in an additive venv.
    """

    project: str
    extras: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    all_extras: bool = False
    default_groups: bool = True
    frozen: bool = False
    python: str | None = None
    requirements: tuple[str, ...] = ()

    def with_packages(self, requirements: Iterable[str]) -> VenvSpec:
        """The same venv with `requirements` (requirements-file lines) laid over it."""
        return replace(self, requirements=_merged(self.requirements, requirements))

    @property
    def base(self) -> VenvSpec:
        """The spec without its additive requirements."""
        return replace(self, requirements=())

    def selection(self) -> list[str]:
        """uv's options that select the extras and groups."""
        options = ["--all-extras"] if self.all_extras else []
        options += [word for extra in self.extras for word in ("--extra", extra)]
        options += [word for group in self.groups for word in ("--group", group)]
        if not self.default_groups:
            options.append("--no-default-groups")
        return options

    def __str__(self) -> str:
        words = ["uv", "run", "--frozen" if self.frozen else "--locked", "--project", shlex.quote(self.project)]
        words += self.selection()
        if self.python is not None:
            words += ["--python", shlex.quote(self.python)]
        return " ".join([*words, *_with_options(self.requirements)])


Spec = VenvSpec | InterpreterSpec


def parse_py_executable(text: str) -> Spec:
    """Read a `py_executable`.

    Any string gives a spec or `InvalidPyExecutableError`, which names what was not accepted. Relative paths are
    relative to the current directory; with neither `--project` nor `--directory` the project is this one. A missing
    `--locked` is added: a worker's venv never changes a lock. `--directory` only says where the project is.
    """
    if not isinstance(text, str):
        raise InvalidPyExecutableError(f"py_executable must be a string, not {type(text).__name__}: {text!r}.")
    try:
        return _parse(text)
    except InvalidPyExecutableError as error:
        raise InvalidPyExecutableError(mask_secrets(str(error))) from None


def _parse(text: str) -> Spec:
    if not text.isprintable():
        raise InvalidPyExecutableError(f"py_executable {text!r} holds control characters.")
    if os.path.isabs(text.strip()) and os.access(text.strip(), os.X_OK):
        return InterpreterSpec(text.strip())  # also when there are spaces in the path
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InvalidPyExecutableError(f"py_executable {text!r} cannot be read: {error}.") from None
    if words[:2] == ["uv", "run"]:
        return _parse_uv_run(text, words[2:])
    if len(words) == 1 and "/" in words[0] and words[0] != "uv":
        return InterpreterSpec(os.path.abspath(words[0]))
    raise InvalidPyExecutableError(
        f"py_executable {text!r} is neither the path of an interpreter (such as sys.executable) nor a "
        f"`uv run ...` string. A path must hold a '/', and must be quoted when it holds spaces; options after it are "
        "not accepted."
    )


def spec_from_runtime_env(runtime_env: Mapping[str, object], base: str | Spec) -> Spec:
    """The additive spec that the `pip` or `uv` field of a Ray `runtime_env` asks for, over `base`.

    Other fields are Ray's to carry out and are not looked at. With neither field the base's spec is returned.
    Raises `RuntimeEnvError` when both are given or one is malformed.
    """
    spec = parse_py_executable(base) if isinstance(base, str) else base
    fields = [name for name in ("pip", "uv") if runtime_env.get(name) is not None]
    if len(fields) == 2:
        raise RuntimeEnvError("runtime_env fields 'pip' and 'uv' cannot both be given; put all packages into one.")
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
    if {"--locked", "--frozen"} <= flags:
        raise InvalidPyExecutableError(f"py_executable {text!r} gives both --locked and --frozen; choose one.")
    return VenvSpec(
        project=_project(values["--directory"], values["--project"]),
        extras=_names(text, "--extra", values["--extra"]),
        groups=_names(text, "--group", values["--group"]),
        all_extras="--all-extras" in flags,
        default_groups="--no-default-groups" not in flags,
        frozen="--frozen" in flags,
        python=values["--python"][0] if values["--python"] else None,
        requirements=_requirements(text, values["--with"], values["--with-requirements"]),
    )


def _options(text: str, words: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield (option, value or None for a flag); refuses everything that is not on the list."""
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
            what = f"option {option}" if word.startswith("-") else f"the word {word!r}"
            raise InvalidPyExecutableError(
                f"py_executable {text!r}: {what} is not accepted after `uv run`. "
                f"Accepted: {', '.join(ACCEPTED_OPTIONS)}."
            )


def _project(directory: list[str], project: list[str]) -> str:
    if not directory and not project:
        return str(settings.project_root())
    # uv changes to --directory first, so a relative --project starts there.
    return os.path.abspath(os.path.join(os.path.expanduser(directory[0]) if directory else "", *project))


def _names(text: str, option: str, values: list[str]) -> tuple[str, ...]:
    for value in values:
        if not _NAME.fullmatch(value):
            raise InvalidPyExecutableError(f"py_executable {text!r}: {option} {value!r} is not a valid name.")
    return tuple(sorted({normalized_name(value) for value in values}))


def _requirements(text: str, packages: list[str], files: list[str]) -> tuple[str, ...]:
    try:
        lines = packages_of([item.strip() for value in packages for item in _split_list(value)])
        for file in files:
            lines += read_requirements_file(file)
    except RuntimeEnvError as error:
        raise InvalidPyExecutableError(f"py_executable {text!r}: {error}") from error
    return _merged((), lines)


def _split_list(value: str) -> list[str]:
    """`--with a,b` is two requirements; a comma inside `a>=1,<2` or `a[x,y]` belongs to the requirement."""
    return [item for item in re.split(r",(?=\s*[A-Za-z_./])(?![^\[]*\])", value) if item.strip()]


def _merged(old: tuple[str, ...], new: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*old, *packages_of(list(new))]))


def _with_options(requirements: tuple[str, ...]) -> list[str]:
    return [word for line in requirements for word in ("--with", shlex.quote(line))]
