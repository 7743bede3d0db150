"""Counts of workers."""

from __future__ import annotations

import shutil
from pathlib import Path

from nemo_rl.pipelines.progress import WorkerCounts, read_counts


def test_late_counts_do_not_recreate_a_directory(tmp_path: Path) -> None:
    counts = WorkerCounts(tmp_path / "run" / "progress")
    counts.counts.tasks_in = 3
    counts.save()
    assert read_counts(tmp_path / "run" / "progress").tasks_in == 3
    shutil.rmtree(tmp_path / "run")
    counts.save()
    assert not (tmp_path / "run").exists()
