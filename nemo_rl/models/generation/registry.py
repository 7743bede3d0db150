"""Which generation backends there are: name in the configuration -> fully qualified name of the worker class.

A new backend is one class and one line here; which Python it runs in is said in
`nemo_rl.distributed.ray_actor_environment_registry`. A worker class takes what `Generation` passes it (see there) and
has the methods of `TorchGenerationWorker`.
"""

from __future__ import annotations

import difflib

from nemo_rl.errors import ConfigError

BACKENDS: dict[str, str] = {
    "torch": "nemo_rl.models.generation.torch.torch_generation_worker.TorchGenerationWorker",
}


def generation_fqn(backend: str) -> str:
    """The worker class of `backend`. Raises `ConfigError` that names the nearest known one."""
    try:
        return BACKENDS[backend]
    except KeyError:
        near = difflib.get_close_matches(backend, BACKENDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"policy.generation.backend={backend!r} is unknown.{hint} Known: {', '.join(sorted(BACKENDS))}. "
            "Add yours to nemo_rl.models.generation.registry.BACKENDS."
        ) from None
