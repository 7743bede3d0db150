"""Environment variables that vLLM reads when it is imported and while it runs."""

from __future__ import annotations

from nemo_rl import settings

_ALWAYS = {
    # The engine runs in the worker's own process: nothing is sent between processes, and weights are loaded in place.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The same model runner on CPUs and GPUs. The other one needs Triton, which the CPU build does not have.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}
_UNLESS_SET = {
    # Its warnings are about choices made on purpose: no compilation on CPUs, the engine in this process.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # Each rank of a tied group sees one GPU. FlashInfer's all-reduce would take it for the node's only GPU.
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
}


def export_vllm_variables() -> None:
    """Set vLLM's variables in this process. The user's values of `_UNLESS_SET` win."""
    user = settings.snapshot()
    settings.export(_ALWAYS | {name: value for name, value in _UNLESS_SET.items() if name not in user})
