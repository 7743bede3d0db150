"""Which policy backends there are. A new one is a worker class and one line here; see docs/adding-a-backend.md."""

from __future__ import annotations

from nemo_rl.models.backends import Backend, PolicyOptions, find_backend
from nemo_rl.models.policy.megatron.config import MegatronOptions

BACKENDS: dict[str, Backend[PolicyOptions]] = {
    "torch": Backend(
        "nemo_rl.models.policy.torch_policy_worker.TorchPolicyWorker",
        PolicyOptions,
        streams_weights=True,
        offloads=True,
    ),
    "megatron": Backend(
        "nemo_rl.models.policy.megatron_policy_worker.MegatronPolicyWorker",
        MegatronOptions,
        streams_weights=True,
        offloads=True,
        # Of kernels that wait for several streams, the one that was issued first must start first. Importing
        # megatron-core already asks CUDA for its devices.
        gpu_env_vars={"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    ),
}


def policy_backend(name: str) -> Backend[PolicyOptions]:
    """The backend called `name`. Raises `ConfigError` that names the nearest known one."""
    return find_backend(BACKENDS, name, key="policy.backend", registry="nemo_rl.models.policy.registry.BACKENDS")
