"""Targets of the command line: worker classes by FQN, and extras of the project."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packaging.utils import canonicalize_name

from nemo_rl import settings
from nemo_rl.errors import ConfigError, InvalidPyExecutableError, NemoRLError
from nemo_rl.utils.names import nearest_names

if TYPE_CHECKING:
    from nemo_rl.venvs import DriverVersions, Spec

BASE = "base"


@dataclass(frozen=True)
class Target:
    """Names one venv.

    Attributes:
        name: name in the venv directory: the FQN, the extra, or `base` for the project without extras.
        py_executable: the py_executable of the venv.
    """

    name: str
    py_executable: str

    def contains(self, text: str) -> bool:
        """Return whether the name or an extra contains `text`, without regard to case."""
        from nemo_rl.venvs import VenvSpec, parse_py_executable

        spec = parse_py_executable(self.py_executable)
        extras = spec.extras if isinstance(spec, VenvSpec) else ()
        return any(text.lower() in words.lower() for words in (self.name, *extras))


def registered_targets() -> list[Target]:
    """Return all registered worker classes."""
    from nemo_rl.distributed.ray_actor_environment_registry import get_actor_python_env, registered_actors

    return [Target(fqn, get_actor_python_env(fqn)) for fqn in registered_actors()]


def find_target(name: str) -> Target:
    """Find a target by name. Raises `UnregisteredActorError` or `ConfigError`, which list the known names."""
    from nemo_rl.distributed.ray_actor_environment_registry import (
        PY_EXECUTABLES,
        get_actor_python_env,
        registered_actors,
        uv_run,
    )

    if "." in name:
        return Target(name, get_actor_python_env(name))
    if name == BASE:
        return Target(BASE, PY_EXECUTABLES.BASE)
    extras = project_extras()
    if canonicalize_name(name) in extras:
        extra = canonicalize_name(name)
        return Target(extra, uv_run("--extra", extra))
    known = [BASE, *extras]
    by_class = {fqn.rpartition(".")[2]: fqn for fqn in registered_actors()}
    if name in by_class:
        raise ConfigError(f"{name!r} is a class name; use its full name: {by_class[name]}")
    near = nearest_names(name, [*known, *by_class])
    hint = f" Did you mean {by_class.get(near[0], near[0])}?" if near else ""
    raise ConfigError(
        f"{name!r} is neither a registered worker class nor an extra of the project.{hint} "
        f"Extras: {', '.join(known)}. Worker classes: see `nemo-rl venvs list`."
    )


def project_extras() -> list[str]:
    """Return the extras of the project, as its lock has them. Raises `VenvError` if it has no readable lock."""
    from nemo_rl.venvs.planning.lock_graph import LockGraph
    from nemo_rl.venvs.planning.resolve import lock_root

    root = settings.project_root()
    return sorted(LockGraph.read(lock_root(str(root)), root).extras)


def is_interpreter(py_executable: str) -> bool:
    """Return whether a py_executable is the path of an interpreter, which needs no build."""
    from nemo_rl.venvs import InterpreterSpec, parse_py_executable

    try:
        return isinstance(parse_py_executable(py_executable), InterpreterSpec)
    except InvalidPyExecutableError:
        return False


def venv_state(py_executable: str | Spec, expected: DriverVersions | None = None) -> tuple[str, str]:
    """Return the state of a venv and the first 16 digits of its digest.

    The state is `ready`, `not built`, `interpreter`, or `cannot be resolved: REASON`.
    """
    from nemo_rl.venvs import find_sealed, plan

    digest = ""
    try:
        venv_plan = plan(py_executable, expected=expected)
        digest = venv_plan.digest[:16]
        if venv_plan.is_interpreter:
            return "interpreter", digest
        return "ready" if find_sealed(venv_plan.digest) is not None else "not built", digest
    except NemoRLError as error:
        return f"cannot be resolved: {str(error).partition(chr(10))[0]}", digest


def short_python(py_executable: str) -> str:
    """Return a py_executable without what all those of the project have in common.

    Example:
        >>> short_python(f"uv run --locked --extra openenv --project {settings.project_root()}")
        'uv run --extra openenv'
        >>> short_python(sys.executable)
        "the driver's"
    """
    words = shlex.split(py_executable)
    if words[:1] == [sys.executable]:
        return " ".join(["the driver's", *words[1:]])
    root = str(settings.project_root())
    kept = [word for word in words if word not in ("--locked", "--project", root)]
    return shlex.join(kept) if "--project" not in words or root in words else py_executable
