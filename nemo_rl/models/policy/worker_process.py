"""What every policy worker does with its process, whatever the backend."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from nemo_rl.models.policy.allocator import keep_freed_memory
from nemo_rl.models.policy.process_group import ProcessGroup
from nemo_rl.models.policy.random_state import seed_everything
from nemo_rl.models.worker_process import process_facts, take_cpu_share


def prepare_process(group: ProcessGroup, num_threads: int | None, num_local_workers: int | None, seed: int) -> None:
    """Take this worker's share of the node's CPUs, seed the generators, keep progress bars out of the log.

    Args:
        num_threads: of torch on a CPU; None takes the share of `num_local_workers` (None: of all workers).
    """
    if group.device.type == "cpu":
        take_cpu_share(num_threads, num_local_workers or group.world_size)
        keep_freed_memory()
        # Moments of weights with hardly any gradient become denormal numbers, with which AdamW takes 20 times as long.
        # Threads inherit this from the one that starts them, so it comes before the first computation.
        torch.set_flush_denormal(True)
    seed_everything(seed, group.rank)
    # Workers write to a log that everybody reads.
    transformers.utils.logging.disable_progress_bar()


def stack(group: ProcessGroup) -> dict[str, Any]:
    """Where this worker runs, and on what: its part of the attestation."""
    device = group.device
    return {
        **process_facts(),
        "rank": group.rank,
        "world_size": group.world_size,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
