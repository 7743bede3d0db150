"""Which environments there are: name in the configuration -> fully qualified name of the actor class.

A new environment is one class and one line here; which Python it runs in is said in
`nemo_rl.distributed.ray_actor_environment_registry`.
"""

from __future__ import annotations

import difflib

from nemo_rl.errors import ConfigError

ENVIRONMENTS: dict[str, str] = {
    "math": "nemo_rl.environments.math_environment.MathEnvironment",
}


def environment_fqn(name: str) -> str:
    """The actor class of the environment `name`. Raises `ConfigError` that names the nearest known one."""
    try:
        return ENVIRONMENTS[name]
    except KeyError:
        near = difflib.get_close_matches(name, ENVIRONMENTS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"Unknown environment {name!r}.{hint} Known: {', '.join(sorted(ENVIRONMENTS))}. "
            "Add yours to nemo_rl.environments.registry.ENVIRONMENTS."
        ) from None
