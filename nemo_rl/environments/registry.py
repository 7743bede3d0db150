"""The registry of environments: name in the configuration -> fully qualified name of the actor class.

To add an environment, write one class and one line here, or in another distribution an entry point of the group
`nemo_rl.environments` (`name = "package.module:Class"`, which is never loaded here).
`nemo_rl.distributed.ray_actor_environment_registry` defines the Python it runs in.
"""

from __future__ import annotations

import functools
import json
import subprocess
from importlib import metadata

from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES, get_actor_python_env
from nemo_rl.environments.config import EnvironmentEntry
from nemo_rl.errors import ConfigError, EnvironmentFailure, UnregisteredActorError
from nemo_rl.utils.names import did_you_mean

ENTRY_POINT_GROUP = "nemo_rl.environments"

_LIST_ENTRY_POINTS = """
import json, sys
from importlib import metadata
points = metadata.distribution(sys.argv[1]).entry_points
print(json.dumps({point.name: point.value.partition(" ")[0] for point in points if point.group == sys.argv[2]}))
"""

ENVIRONMENTS: dict[str, str] = {
    "math": "nemo_rl.environments.math_environment.MathEnvironment",
}


def registered_environments() -> dict[str, str]:
    """Return the class of each registered environment, by name: those of this package and of installed ones."""
    return {**_entry_points(), **ENVIRONMENTS}


def environment_fqn(name: str) -> str:
    """Return the actor class of the environment `name`. Raises `ConfigError` that names the nearest known name."""
    known = registered_environments()
    try:
        return known[name]
    except KeyError:
        hint = did_you_mean(name, known)
        raise ConfigError(
            f"Unknown environment {name!r}.{hint} Known: {', '.join(sorted(known))}. Add yours to "
            f"nemo_rl.environments.registry.ENVIRONMENTS, or by an entry point of the group {ENTRY_POINT_GROUP!r}."
        ) from None


def registered_in(python: str, distribution: str) -> dict[str, str]:
    """Return the environments that a distribution of another Python registers. Raises `EnvironmentFailure`."""
    done = subprocess.run(
        [python, "-c", _LIST_ENTRY_POINTS, distribution, ENTRY_POINT_GROUP], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise EnvironmentFailure(f"{python} cannot read the entry points of {distribution}: {done.stderr.strip()}")
    return {name: value.replace(":", ".") for name, value in json.loads(done.stdout).items()}


def entry_fqn(entry: EnvironmentEntry) -> str:
    """Return the class or function of a named environment. Raises `ConfigError` for an unknown name without dots."""
    return entry.class_ if "." in entry.class_ else environment_fqn(entry.class_)


def entry_python(entry: EnvironmentEntry) -> str:
    """Return the py_executable of a named environment's workers: its own, the registered one, or the driver's."""
    if entry.own_process:
        return PY_EXECUTABLES.SYSTEM
    if entry.py_executable is not None:
        return entry.py_executable
    try:
        return get_actor_python_env(entry_fqn(entry))
    except UnregisteredActorError:
        return PY_EXECUTABLES.SYSTEM


@functools.cache
def _entry_points() -> dict[str, str]:
    """Return the environments of installed distributions, without importing them."""
    return {point.name: f"{point.module}.{point.attr}" for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}
