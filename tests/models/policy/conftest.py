from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The scenarios are pickled by name for other processes, so their modules must be importable by that name.
sys.path.insert(0, str(Path(__file__).parent))

from rank_processes import RankProcesses, megatron_python
from tiny_policy import make_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("tied_llama"), tied=True)


@pytest.fixture(scope="module")
def megatron_ranks() -> Iterator[RankProcesses]:
    with RankProcesses(2, megatron_python()) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankProcesses]:
    with RankProcesses(4, megatron_python()) as ranks:
        yield ranks


@pytest.fixture(scope="package")
def two_ranks() -> Iterator[RankProcesses]:
    with RankProcesses(2) as ranks:
        yield ranks
