"""A stage at work in this process, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sample_stages import KeepFirstOfEach, batches, numbers

from nemo_rl.errors import StageInputError
from nemo_rl.pipelines.items import Item
from nemo_rl.pipelines.runner import StageJob, StageRunner, spool_directory
from nemo_rl.pipelines.spool import Spool, SpooledTasks, SpoolWriter
from nemo_rl.pipelines.stage import AnyStage


def job(stage: AnyStage, directory: Path, **changes: Any) -> StageJob:
    values: dict[str, Any] = {
        "segment": 1,
        "index": 0,
        "attempt": 1,
        "max_retries": 0,
        "on_failure": "set_aside",
        "spools": True,
        "is_last": True,
        "num_cpus": 2.0,
    }
    return StageJob(stage=stage, directory=str(directory), **{**values, **changes})


def items(num_tasks: int) -> list[Item]:
    return [Item(task.frozen(), (index,)) for index, task in enumerate(batches(num_tasks))]


def spooled(directory: Path, num_sources: int) -> list[Any]:
    entries, missing = Spool.read(spool_directory(directory, 1)).results(num_sources)
    assert not missing
    return list(SpooledTasks(entries))


def test_a_gathering_stage_does_not_run_without_all_of_its_input(tmp_path: Path) -> None:
    """On another node the directory may not be there at all, or hold a part."""
    stage = KeepFirstOfEach(100)
    for num_there in (0, 5):
        SpoolWriter(spool_directory(tmp_path, 0), 1).write([], items(num_there))
        with pytest.raises(StageInputError, match=rf"{8 - num_there} of 8 inputs are not in .*file system that all"):
            StageRunner(job(stage, tmp_path)).gather(8)
    SpoolWriter(spool_directory(tmp_path, 0), 1).write([], items(8))
    assert StageRunner(job(stage, tmp_path)).gather(8) == 8
    assert numbers(spooled(tmp_path, 8)) == list(range(16))
