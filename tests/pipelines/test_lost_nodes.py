"""Pipelines over two nodes, one of which is lost in the middle: every input is in the output exactly once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from sample_stages import AddOne, SplitRows, batches, numbers
from simulated_nodes import simulated_nodes

from nemo_rl.pipelines import DocumentBatch, Executor, Pipeline, ProcessingStage, Resources

NUM_BATCHES = 24


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head, the driver's own node, and a second one."""
    with simulated_nodes({"num_cpus": 2}, {"num_cpus": 2}) as cluster:
        _, cluster.second = cluster.list_all_nodes()
        yield cluster


class OnNode(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Takes its time, leaves a file per task and node, and makes every task so large that it stays on its node."""

    resources = Resources(cpus=0.4)
    num_workers = 4  # Ray fills a node to the half first, and then the other one

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self) -> None:
        import ray

        self.node = ray.get_runtime_context().get_node_id()

    def process(self, task: DocumentBatch) -> DocumentBatch:
        time.sleep(0.2)
        (self.folder / f"{self.node}-{task._lineage}-{time.time_ns()}").touch()
        return task.with_data(task.to_pandas().assign(ballast="x" * 10**6))


def lose_second(nodes: Cluster, folder: Path, num_taken: int, found: list[int]) -> None:
    """When it has processed so many tasks."""
    node_id = nodes.second.node_id
    deadline = time.monotonic() + 60
    while len(list(folder.glob(f"{node_id}-*"))) < num_taken and time.monotonic() < deadline:
        time.sleep(0.02)
    found.append(len(list(folder.glob(f"{node_id}-*"))))
    nodes.remove_node(nodes.second, allow_graceful=False)


@pytest.mark.slow
@pytest.mark.parametrize("resumable", [True, False], ids=["run_dir", "no run_dir"])
def test_a_lost_node_loses_no_task(nodes: Cluster, executor: Executor, tmp_path: Path, resumable: bool) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    found: list[int] = []
    loss = threading.Thread(target=lose_second, args=(nodes, taken, 2, found))
    loss.start()
    small = Resources(cpus=0.1)  # all have room on one node
    stages = [AddOne().with_(resources=small), OnNode(taken), SplitRows().with_(resources=small)]
    tasks = Pipeline("p", stages=stages).run(
        executor, batches(NUM_BATCHES), run_dir=tmp_path / "run" if resumable else None
    )
    loss.join()
    assert numbers(tasks) == list(range(1, 2 * NUM_BATCHES + 1))
    assert found[0] >= 2
