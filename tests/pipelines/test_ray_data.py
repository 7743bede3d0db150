"""Ray Data executor: check of the capacity, and what remains after an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from sample_stages import AddOne, KeepFirstOfEach, batches, numbers

from nemo_rl.distributed.cluster.session import start_local_ray
from nemo_rl.errors import ResourceInsufficientError
from nemo_rl.pipelines import DocumentBatch, Pipeline, ProcessingStage, RayActorPoolExecutor, RayDataExecutor, Resources
from nemo_rl.pipelines.bootstrap import DataStage
from nemo_rl.pipelines.executors.ray_data import _release_workers


@pytest.fixture(scope="module")
def one_gpu() -> Iterator[None]:
    """A cluster that reports one GPU."""
    assert not ray.is_initialized(), "another test left Ray running"
    start_local_ray(num_cpus=2, num_gpus=1)
    yield
    ray.shutdown()


class Notes(ProcessingStage[DocumentBatch, DocumentBatch]):
    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def process(self, task: DocumentBatch) -> DocumentBatch:
        Path(self.file).touch()
        return task


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.slow
def test_later_segments_are_checked_for_gpus(tmp_path: Path) -> None:
    gpu = Resources(cpus=0.5, gpus=1)
    stages: list[Any] = [Notes(tmp_path / "ran"), KeepFirstOfEach(4)]
    stages += [AddOne().with_(name=name, resources=gpu) for name in ("one", "two")]
    with pytest.raises(ResourceInsufficientError, match="one, two need 2 GPUs and the cluster has 1"):
        Pipeline("p", stages=stages).run(RayDataExecutor(), batches(3))
    assert not (tmp_path / "ran").exists()
    # Stages that run one after another can share the GPU.
    assert len(numbers(Pipeline("p", stages=stages).run(RayActorPoolExecutor(), batches(3)))) == 4
    assert (tmp_path / "ran").exists()


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.slow
def test_workers_of_other_runs_are_kept() -> None:
    class Worker:
        def answer(self) -> bool:
            return True

    def worker_of(run: type[DataStage]) -> Any:  # named as Ray Data names it
        return ray.remote(num_cpus=0)(type(f"MapWorker(MapBatches({run.__name__}))", (Worker,), {})).remote()

    failed, running = (type(f"DataStage_{run}", (DataStage,), {}) for run in (1, 2))
    kept, killed = worker_of(running), worker_of(failed)
    assert ray.get([kept.answer.remote(), killed.answer.remote()]) == [True, True]
    _release_workers(ValueError(), failed)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(killed.answer.remote())
    assert ray.get(kept.answer.remote())


def test_functions_of_the_caller_keep_their_local_variables() -> None:
    def errors() -> Iterator[ValueError | str]:
        variable = "kept"
        try:
            raise ValueError
        except ValueError as error:
            yield error  # its traceback holds the frame of this generator
        yield variable

    generator = errors()
    error = next(generator)
    assert isinstance(error, ValueError)
    _release_workers(error, DataStage)
    assert next(generator) == "kept"
