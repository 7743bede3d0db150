"""The registry of environments: name in the configuration -> fully qualified name of the actor class.

To add an environment, write one class and one line here, or in another distribution an entry point of the group
`nemo_rl.environments` (`name = "package.module:Class"`, which is never loaded here).
`nemo_rl.distributed.ray_actor_environment_registry` defines the Python it runs in.
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
    """Return the actor class of the environment `name`. Raises `ConfigError` that names the nearest known name."""
    known = {**_entry_points(), **ENVIRONMENTS}
    try:
        return known[name]
    except KeyError:
        hint = did_you_mean(name, known)
        raise ConfigError(
            f"Unknown environment {name!r}.{hint} Known: {', '.join(sorted(known))}. Add yours to "
            f"nemo_rl.environments.registry.ENVIRONMENTS, or by an entry point of the group {ENTRY_POINT_GROUP!r}."
        ) from None


@functools.cache
def _entry_points() -> dict[str, str]:
    """Return the environments of installed distributions, without importing them."""
    return {point.name: f"{point.module}.{point.attr}" for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}
