"""Which generation backends there are. A new one is a worker class and one line here; see docs/adding-a-backend.md.

A worker class takes what `Generation` passes it (see there) and has the methods of `TorchGenerationWorker`.
"""

from __future__ import annotations

from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES
from nemo_rl.models.backends import Backend, GenerationOptions, find_backend
from nemo_rl.models.generation.vllm.config import VllmOptions

BACKENDS: dict[str, Backend[GenerationOptions]] = {
    "torch": Backend(
        "nemo_rl.models.generation.torch.torch_generation_worker.TorchGenerationWorker",
        GenerationOptions,
        streams_weights=True,
    ),
    "vllm": Backend(
        "nemo_rl.models.generation.vllm.vllm_worker.VllmGenerationWorker",
        VllmOptions,
        cpu_py_executable=PY_EXECUTABLES.VLLM_CPU,
        replaces=PY_EXECUTABLES.VLLM,
        streams_weights=True,
    ),
}


def generation_backend(name: str) -> Backend[GenerationOptions]:
    """The backend called `name`. Raises `ConfigError` that names the nearest known one."""
    return find_backend(
        BACKENDS, name, key="policy.generation.backend", registry="nemo_rl.models.generation.registry.BACKENDS"
    )
