"""The process group of a policy's workers, and the state of their random number generators."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from nemo_rl import settings
from nemo_rl.errors import WorkerError


@dataclass(frozen=True)
class ProcessGroup:
    """Describes this process's place among the processes that train one model together.

    Attributes:
        rank: 0 <= rank < world_size.
        world_size: number of processes.
        device: device of this process.
        handle: torch's group of these processes; None: the default group of all processes.
    """

    rank: int
    world_size: int
    device: torch.device
    handle: dist.ProcessGroup | None = None

    def sum(self, values: list[float]) -> list[float]:
        """Return the element-wise sum over all ranks, in float64. A collective."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        """Return the element-wise maximum over all ranks. NaN is never the maximum. A collective."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: list[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.world_size == 1 or not values:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation, group=self.handle)
        reduced: list[float] = tensor.tolist()
        return reduced

    def barrier(self) -> None:
        """Wait until all ranks have called this. A collective."""
        self.sum([0.0])


def join_process_group(*, device_type: str | None, needs_collectives: bool) -> ProcessGroup:
    """Join the group that `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` describe; NCCL on GPUs, gloo on CPUs.

    Args:
        device_type: "cuda", "cpu", or None for a GPU if there is one.
        needs_collectives: initialize `torch.distributed` even for a single process, as FSDP requires.

    Raises:
        WorkerError: the address of rank 0 is missing, the processes do not connect, or "cuda" finds no GPU.
    """
    rank, world_size = settings.RANK.get(), settings.WORLD_SIZE.get()
    device = _device(device_type)
    if world_size > 1 or needs_collectives:
        _initialize(rank, world_size, device)
    return ProcessGroup(rank, world_size, device)


def _device(device_type: str | None) -> torch.device:
    available = torch.cuda.is_available()
    if device_type == "cpu" or (device_type is None and not available):
        return torch.device("cpu")
    if not available:
        raise WorkerError(
            f"this worker needs a GPU, but torch {torch.__version__} finds none: check the NVIDIA driver, "
            "CUDA_VISIBLE_DEVICES, and that the venv has a CUDA build of torch"
        )
    # Ray makes only the worker's GPU visible. A launcher that makes all of them visible sets LOCAL_RANK.
    index = settings.LOCAL_RANK.get() % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _initialize(rank: int, world_size: int, device: torch.device) -> None:
    address, port = settings.MASTER_ADDR.get(), settings.MASTER_PORT.get()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        if address is None or port is None:
            if world_size > 1:
                raise WorkerError(
                    f"rank {rank} of {world_size}: MASTER_ADDR and MASTER_PORT must be the address of rank 0"
                )
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        else:
            method = f"tcp://{address}:{port}"
            dist.init_process_group(backend, init_method=method, rank=rank, world_size=world_size)
    except (RuntimeError, dist.DistError) as error:
        raise WorkerError(
            f"rank {rank} of {world_size} cannot join its process group at {address}:{port}: {error}"
        ) from error


def seed_everything(seed: int, rank: int) -> None:
    """Seed the generators of Python, numpy and torch, differently on every rank and reproducibly."""
    words = np.random.SeedSequence([seed, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def capture_random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the generators' states as CPU tensors with equal shapes on all ranks, including that of a GPU `device`.

    A worker on CPUs does not query GPUs, even if some are visible to it.
    """
    _, python_words, python_gauss = random.getstate()
    _, numpy_words, position, has_gauss, numpy_gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    state = {
        "python": torch.tensor(python_words, dtype=torch.int64),
        "numpy": torch.tensor([*numpy_words.tolist(), position, has_gauss], dtype=torch.int64),  # type: ignore[union-attr]
        # NaN: there is no cached normal deviate.
        "gauss": torch.tensor([math.nan if python_gauss is None else python_gauss, numpy_gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore the states of `capture_random_state`. A state without a GPU's leaves a GPU's generator unchanged."""
    python_gauss, numpy_gauss = state["gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), None if math.isnan(python_gauss) else python_gauss))
    *numpy_words, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(numpy_words, dtype=np.uint32), position, has_gauss, numpy_gauss))
    torch.set_rng_state(state["torch"].contiguous())
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].contiguous(), device)
