"""Pipelines that lose one of two nodes during the run. Every input is in the output exactly once."""

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
    """A cluster of the head node, on which the driver runs, and a second node."""
    with simulated_nodes({"num_cpus": 2}, {"num_cpus": 2}) as cluster:
        _, cluster.second = cluster.list_all_nodes()
        yield cluster


class OnNode(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Sleeps, creates a file per task and node, and makes each task so large that it stays on its node."""

    resources = Resources(cpus=0.4)
    num_workers = 4  # Ray fills half of one node first, then the other node

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self) -> None:
        import ray

        self.node = ray.get_runtime_context().get_node_id()

    def process(self, task: DocumentBatch) -> DocumentBatch:
        time.sleep(0.2)
        (self.folder / f"{self.node}-{task._lineage}-{time.time_ns()}").touch()
        return task.with_data(task.to_pandas().assign(ballast="x" * 10**6))


def lose_second(nodes: Cluster, folder: Path, num_taken: int, counts: list[int]) -> None:
    """Remove the second node once it has processed `num_taken` tasks."""
    node_id = nodes.second.node_id
    deadline = time.monotonic() + 600
    while len(list(folder.glob(f"{node_id}-*"))) < num_taken and time.monotonic() < deadline:
        time.sleep(0.02)
    counts.append(len(list(folder.glob(f"{node_id}-*"))))
    nodes.remove_node(nodes.second, allow_graceful=False)


@pytest.mark.slow
@pytest.mark.parametrize("resumable", [True, False], ids=["run_dir", "no run_dir"])
def test_node_loss_loses_no_task(nodes: Cluster, executor: Executor, tmp_path: Path, resumable: bool) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    counts: list[int] = []
    loss = threading.Thread(target=lose_second, args=(nodes, taken, 2, counts))
    loss.start()
    small = Resources(cpus=0.1)  # all workers fit on one node
    stages = [AddOne().with_(resources=small), OnNode(taken), SplitRows().with_(resources=small)]
    tasks = Pipeline("p", stages=stages).run(
        executor, batches(NUM_BATCHES), run_dir=tmp_path / "run" if resumable else None
    )
    loss.join()
    assert numbers(tasks) == list(range(1, 2 * NUM_BATCHES + 1))
    assert counts[0] >= 2
