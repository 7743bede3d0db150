"""Targets of the command line: worker classes by FQN, and extras of the project."""

from __future__ import annotations

from dataclasses import dataclass

from packaging.utils import canonicalize_name

from nemo_rl import settings
from nemo_rl.errors import ConfigError, InvalidPyExecutableError
from nemo_rl.utils.names import nearest_names

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
