"""What the GPU tests share. A test whose packages or devices are not there is skipped, and says which."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_REPOSITORY = Path(__file__).parents[2]
for _directory in ("tests/models/policy", "tests/models/generation", "benchmarks"):
    sys.path.insert(0, str(_REPOSITORY / _directory))

from rank_processes import RankProcesses, megatron_python  # noqa: E402

from nemo_rl.errors import VenvError  # noqa: E402


@pytest.fixture(autouse=True)
def leave_nothing() -> Iterator[None]:
    """What is measured of memory must not depend on the tests before."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.unfreeze()  # workers freeze what they hold
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def one_gpu() -> Iterator[RankProcesses]:
    with RankProcesses(1, _megatron_python()) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two_gpus_of_megatron() -> Iterator[RankProcesses]:
    skip_without_two_gpus()
    with RankProcesses(2, _megatron_python()) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[RankProcesses]:
    skip_without_two_gpus()
    with RankProcesses(2) as ranks:
        yield ranks


def skip_without_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")


def _megatron_python() -> str:
    try:
        return megatron_python()
    except VenvError as error:
        pytest.skip(f"megatron.core is not installed here, and its venv cannot be made: {error}")
