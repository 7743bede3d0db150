"""Runs the scripts of examples/ as a user does, in processes of their own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "run_grpo_math.py"
SMALL = (
    "grpo.num_prompts_per_step=4",
    "grpo.num_generations_per_prompt=4",
    "grpo.validation.period=2",
    "grpo.validation.max_num_problems=16",
    "checkpointing.save_period=1",
    "policy.train_global_batch_size=null",
)


def command(*arguments: str, script: Path = SCRIPT) -> list[str]:
    return [sys.executable, str(script), *arguments]


def run(*arguments: str, script: Path = SCRIPT, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments, script=script), capture_output=True, text=True, timeout=800, check=False, **options
    )


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def reproducible_metrics(records: list[dict]) -> list[dict]:
    """Drop the metrics that may differ between equal runs: times, and the logprob check after a resume."""
    skip = ("timing/", "perf/", "train/logprob_error", "val/env_verify_latency", "train/env_verify_latency", "time")
    return [{k: v for k, v in record.items() if not k.startswith(skip)} for record in records]


def wait_for(condition, job: subprocess.Popen | None, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        if job is not None and job.poll() is not None:
            raise AssertionError(f"the job ended with {job.returncode}: {job.stderr.read() if job.stderr else ''}")
        time.sleep(0.05)


def has_saved(directory: Path, step: int) -> bool:
    """Whether a run has a checkpoint of this step or of a later one: a fast machine soon removes the first ones."""
    return any(path.name >= f"step_{step:06}" for path in (directory / "checkpoints").glob("step_*"))


def orphans(driver: int) -> list[int]:
    """Return the Ray processes of the session that `driver` started. The session name has its process id."""
    pids = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if f"_{driver}/" in line or line.endswith(f"_{driver}"):
            pids.append(process.pid)
    return [pid for pid in pids if pid not in (driver, os.getpid())]
