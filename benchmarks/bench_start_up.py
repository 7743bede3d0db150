"""Measures the time from the command to the first training step of the default job: cold, and in a warm session.

    uv run benchmarks/bench_start_up.py

Every case is one `uv run` command. The baseline is a plain script that imports torch and transformers and starts Ray:
what a user's own script needs before it does anything. All venvs are built, and the model is made, before the first
round.

| case | command |
| --- | --- |
| plain script | imports torch, transformers and ray, and calls `ray.init()` |
| job | the default job, which starts a local Ray cluster |
| job, warm session | the default job while `nemo-rl session start` runs, after two jobs |
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

import harness
from harness import Case, Metrics, Ratio

from nemo_rl.observability.timer import FIRST_STEP, read_timeline

JOB = "examples/run_grpo_math.py"
UNTIL_READY = "until the first step, s"
PLAIN = """
import time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import ray
ray.init(include_dashboard=False, configure_logging=False)
print(time.time())
"""


def main() -> None:
    parser = harness.parser(__doc__)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nrl") as directory:
        scratch = Path(directory)
        # The session's files are in the temporary directory: another session of this user is not touched.
        variables = {**os.environ, "TMPDIR": directory}
        subprocess.run(["uv", "run", "nemo-rl", "session", "start"], env=variables, cwd=harness.REPOSITORY, check=True)
        try:
            for _ in range(2):  # the first two jobs show the session what to import
                _job(scratch, variables)
                time.sleep(30)
            cases = [
                Case("plain script", lambda: _plain(variables)),
                Case("job", lambda: _job(scratch, {**os.environ, "RAY_ADDRESS": "local"})),
                Case("job, warm session", lambda: _job(scratch, variables)),
            ]
            results = harness.measure(cases, arguments.repeats, warmups=1)
        finally:
            command = ["uv", "run", "nemo-rl", "session", "stop", "--force"]
            subprocess.run(command, env=variables, cwd=harness.REPOSITORY, check=True)
    ratios = [
        Ratio(UNTIL_READY, "job", "plain script", at_most=1.2),
        Ratio(UNTIL_READY, "job, warm session", "plain script", at_most=0.4),
    ]
    harness.report("start_up", results, ratios, arguments.json)


def _plain(variables: dict[str, str]) -> Metrics:
    started = time.time()
    # Otherwise Ray copies the project to its session, because the driver was started by `uv run`.
    environment = {**variables, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_ADDRESS": "local"}
    output = harness.run(["uv", "run", "python", "-c", PLAIN], env=environment, cwd=harness.REPOSITORY)
    return {UNTIL_READY: float(output.split()[-1]) - started}


def _job(scratch: Path, variables: dict[str, str]) -> Metrics:
    """Run the default job for one step; return the seconds from the command to the begin of the step."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix="run_") as directory:
        options = ["grpo.max_num_steps=1", "grpo.validation.at_start=false", f"logger.log_dir={directory}/run"]
        started = time.time()
        harness.run(["uv", "run", JOB, *options], env=variables, cwd=harness.REPOSITORY)
        [first_step] = [event.end for event in read_timeline(Path(directory, "run")) if event.name == FIRST_STEP]
    return {UNTIL_READY: first_step - started}


if __name__ == "__main__":
    main()
