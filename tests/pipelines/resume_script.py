"""Runs a pipeline that test_resume kills and starts again.

`resume_script.py FOLDER EXECUTOR SECONDS [gathers|late]`
"""

from __future__ import annotations

import sys
from pathlib import Path

from sample_stages import AddOne, KeepFirstOfEach, Slow, SplitRows

from nemo_rl.pipelines import Pipeline, RayActorPoolExecutor, RayDataExecutor, XennaExecutor
from nemo_rl.pipelines.io.readers import JsonlReader
from nemo_rl.pipelines.io.writers import JsonlWriter


def main(folder: Path, executor: str, seconds: float, options: list[str]) -> None:
    stages = [
        JsonlReader(folder / "in", task_size=20),
        SplitRows().with_(name="split"),
        Slow(str(folder / "taken"), 0.0 if "late" in options else seconds).with_(num_workers=2),
        *([KeepFirstOfEach(10**6)] if "gathers" in options else []),
        AddOne(),
        *([Slow(str(folder / "late"), seconds).with_(name="late", num_workers=2)] if "late" in options else []),
        JsonlWriter(folder / "out"),
    ]
    chosen = {"actor_pool": RayActorPoolExecutor, "ray_data": RayDataExecutor, "xenna": XennaExecutor}[executor]()
    tasks = Pipeline("resumed", stages=stages).run(chosen, run_dir=folder / "run")
    sys.stdout.write(f"{len(tasks)} shards\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4:])
