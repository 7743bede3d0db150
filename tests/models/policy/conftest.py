from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The scenarios are pickled by name for other processes, so their modules must be importable by that name.
sys.path.insert(0, str(Path(__file__).parent))

from rank_processes import RankProcesses
from tiny_policy import make_llama

from nemo_rl.distributed.py_executables import PY_EXECUTABLES
from nemo_rl.venvs import create_local_venv


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("tied_llama"), tied=True)


@pytest.fixture(scope="session")
def megatron_python() -> str:
    """The Python of the MCORE venv, built if need be."""
    return create_local_venv(PY_EXECUTABLES.MCORE, "nemo_rl.models.policy.megatron_policy_worker.MegatronPolicyWorker")


@pytest.fixture(scope="module")
def megatron_ranks(megatron_python: str) -> Iterator[RankProcesses]:
    with RankProcesses(2, megatron_python) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four_ranks(megatron_python: str) -> Iterator[RankProcesses]:
    with RankProcesses(4, megatron_python) as ranks:
        yield ranks


@pytest.fixture(scope="package")
def two_ranks() -> Iterator[RankProcesses]:
    with RankProcesses(2) as ranks:
        yield ranks
