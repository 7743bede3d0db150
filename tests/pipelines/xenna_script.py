"""Runs pipelines on Xenna, in a venv with cosmos-xenna, and prints the results as JSON. See test_xenna."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sample_stages import (
    AddOne,
    Failing,
    KeepFirstOfEach,
    KillsWorker,
    PackagingVersion,
    SplitRows,
    batches,
    numbers,
)

from nemo_rl.distributed.cluster.session import start_local_ray
from nemo_rl.errors import StageError
from nemo_rl.pipelines import Pipeline, XennaExecutor, failed_tasks


def main(folder: Path) -> None:
    start_local_ray(num_cpus=4)
    versions = [
        PackagingVersion().with_(name="base"),
        PackagingVersion().with_(name="pip", runtime_env={"pip": ["packaging==23.2"]}),
        PackagingVersion().with_(name="uv", runtime_env={"uv": ["packaging==24.0"]}),
        SplitRows(),
    ]
    tasks = Pipeline("versions", stages=versions).run(XennaExecutor(), batches(6))
    frames = [task.to_pandas() for task in tasks]
    aside = Pipeline("p", stages=[Failing([3]), KeepFirstOfEach(4), AddOne()])
    remaining = aside.run(XennaExecutor(), batches(6), run_dir=folder / "run")
    try:
        Pipeline("p", stages=[AddOne(), Failing([7])]).run(XennaExecutor(), batches(8))
        message = ""
    except StageError as error:
        message = str(error)
    deaths = folder / "deaths"
    deaths.mkdir()
    dying = Pipeline("p", stages=[AddOne(), KillsWorker(9, str(deaths), num_times=1), AddOne().with_(name="last")])
    survived = dying.run(XennaExecutor(), batches(16), run_dir=folder / "dying")
    result = {
        "numbers": numbers(tasks),
        "versions": sorted({tuple(frame[["base", "pip", "uv"]].iloc[0]) for frame in frames}),
        "remaining": numbers(remaining),
        "failed": [task.error for task in failed_tasks(folder / "run")],
        "message": message,
        "survived": numbers(survived),
        "deaths": len(list(deaths.iterdir())),
        "attempts": json.loads((folder / "dying" / "run.json").read_text())["attempts"],
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
