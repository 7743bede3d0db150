"""The registry of environments: name in the configuration -> fully qualified name of the actor class.

To add an environment, write one class and one line here, or in another distribution an entry point of the group
`nemo_rl.environments` (`name = "package.module:Class"`, which is never loaded here).
`nemo_rl.distributed.ray_actor_environment_registry` defines the Python it runs in.
"""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES, get_actor_python_env
from nemo_rl.distributed.workers.runtime_env_fields import PYTHON_FIELDS, checked_runtime_env, ray_chooses_python
from nemo_rl.environments.config import EnvironmentEntry
from nemo_rl.environments.scoring_config import DeclaredConfig, JudgeConfig, RewardModelConfig
from nemo_rl.errors import ConfigError, EnvironmentFailure, RuntimeEnvError, UnregisteredActorError
from nemo_rl.utils.config import validate
from nemo_rl.utils.names import did_you_mean

ENTRY_POINT_GROUP = "nemo_rl.environments"
# The actor class that runs environments with turns.
WORKER_FQN = "nemo_rl.environments.environment_worker.EnvironmentWorker"

_LIST_ENTRY_POINTS = """
import json, sys
from importlib import metadata
points = metadata.distribution(sys.argv[1]).entry_points
print(json.dumps({point.name: point.value.partition(" ")[0] for point in points if point.group == sys.argv[2]}))
"""

ENVIRONMENTS: dict[str, str] = {
    "math": "nemo_rl.environments.math_environment.MathEnvironment",
}
# Environments with turns, for `env.<name>.class`.
EPISODE_ENVIRONMENTS: dict[str, str] = {
    "judge": "nemo_rl.environments.judge.Judge",
    "reward_model": "nemo_rl.environments.reward_model.RewardModel",
}
# The keyword arguments of environments that are checked before anything starts, by the class of the environment.
DECLARED_CONFIGS: dict[str, type[DeclaredConfig]] = {
    EPISODE_ENVIRONMENTS["judge"]: JudgeConfig,
    EPISODE_ENVIRONMENTS["reward_model"]: RewardModelConfig,
}


def registered_environments() -> dict[str, str]:
    """Return the class of each registered environment, by name: those of this package and of installed ones."""
    return {**_entry_points(), **EPISODE_ENVIRONMENTS, **ENVIRONMENTS}


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


def declared_config(where: str, fqn: str, config: Mapping[str, Any]) -> DeclaredConfig | None:
    """Check the keyword arguments of an environment, and return them; None for one without `DECLARED_CONFIGS`.

    Raises:
        ConfigError: a key or a value is wrong. The message begins with `where`.
    """
    schema = DECLARED_CONFIGS.get(fqn)
    if schema is None:
        return None
    checked = validate(schema, dict(config), where=where)
    checked.check(where)
    return checked


def entry_runtime_env(where: str, entry: EnvironmentEntry) -> dict[str, Any] | None:
    """Return the `runtime_env` of an environment with the variables of this process that its `config` asks for.

    Raises the errors of `declared_config`.
    """
    declared = declared_config(f"{where}.config", entry_fqn(entry), entry.config)
    variables = {} if declared is None else declared.variables()
    if not variables:
        return entry.runtime_env
    fields = dict(entry.runtime_env or {})
    return {**fields, "env_vars": {**variables, **(fields.get("env_vars") or {})}}


def python_fields(
    where: str,
    fqn: str,
    py_executable: str | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    *,
    own_process: bool = False,
) -> dict[str, Any]:
    """Return the checked `runtime_env` of an environment, with the Python of its code as the field `py_executable`.

    It is the given one, the registered one of `fqn`, or the driver's. With `own_process`, it is that of the child
    processes. If Ray creates the Python, because of a field such as `conda`, there is no `py_executable`.

    Args:
        where: what messages call the environment, such as "env.<name>".

    Raises:
        RuntimeEnvError: a field is wrong, or Ray would have to create the Python of a child process.
    """
    fields = checked_runtime_env(runtime_env, f"{where}.runtime_env", py_executable)
    if ray_chooses_python(fields):
        if own_process:
            raise RuntimeEnvError(
                f"{where} runs in a child process, whose Python Ray cannot create. Use pip, uv or py_executable "
                f"instead of {', '.join(name for name in PYTHON_FIELDS if name in fields)}."
            )
        return fields
    return {"py_executable": _default_python(fqn), **fields}


def _default_python(fqn: str) -> str:
    try:
        return get_actor_python_env(fqn)
    except UnregisteredActorError:
        return PY_EXECUTABLES.SYSTEM


@functools.cache
def _entry_points() -> dict[str, str]:
    """Return the environments of installed distributions, without importing them."""
    return {point.name: f"{point.module}.{point.attr}" for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}
