"""Which environments there are: name in the configuration -> fully qualified name of the actor class.

A new environment is one class and one line here, or in another distribution an entry point of the group
`nemo_rl.environments` (`name = "package.module:Class"`, which is never loaded here); which Python it runs in is said in
`nemo_rl.distributed.ray_actor_environment_registry`.
"""

from __future__ import annotations

import functools
from importlib import metadata

from nemo_rl.errors import ConfigError
from nemo_rl.utils.names import did_you_mean

ENTRY_POINT_GROUP = "nemo_rl.environments"

ENVIRONMENTS: dict[str, str] = {
    "math": "nemo_rl.environments.math_environment.MathEnvironment",
}


def environment_fqn(name: str) -> str:
    """The actor class of the environment `name`. Raises `ConfigError` that names the nearest known one."""
    known = {**_installed(), **ENVIRONMENTS}
    try:
        return known[name]
    except KeyError:
        hint = did_you_mean(name, known)
        raise ConfigError(
            f"Unknown environment {name!r}.{hint} Known: {', '.join(sorted(known))}. Add yours to "
            f"nemo_rl.environments.registry.ENVIRONMENTS, or by an entry point of the group {ENTRY_POINT_GROUP!r}."
        ) from None


@functools.cache
def _installed() -> dict[str, str]:
    """What installed distributions name. Names are read; nothing is imported."""
    return {point.name: f"{point.module}.{point.attr}" for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}
