"""What the comparisons of a job with a trainer of TRL share: options, cases, and how both sides are run.

Our side runs as users run it. TRL runs in one process, in an environment that `uv run --with` creates.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from harness import Case, Metrics

TRL = "trl==1.16.0"
# Environment variables of TRL, by case. Passive: waiting threads sleep instead of spinning.
BASELINES: dict[str, Mapping[str, str]] = {"trl": {}, "trl, passive": {"OMP_WAIT_POLICY": "PASSIVE"}}

Facts = dict[str, Any]
# Runs one side once; returns its metrics and the facts about its work.
Run = Callable[[], tuple[Metrics, Facts]]


def parse_arguments(description: str | None, cases: Sequence[str], *, steps: int) -> argparse.Namespace:
    """Parse the command line, and restrict this process and its children to the given number of cores."""
    parser = harness.parser(description)
    parser.add_argument("--threads", type=int, default=2, help="threads that compute at the same time (default: 2)")
    parser.add_argument("--steps", type=int, default=steps, help=f"steps of one run (default: {steps})")
    parser.add_argument("--warmup-steps", type=int, default=10, help="of these, untimed steps (default: 10)")
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="further configuration of our side")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    return arguments


def case(name: str, run: Run, facts: dict[str, Facts]) -> Case:
    """Return a case that keeps the facts of its last run in `facts`, by its name."""

    def measured() -> Metrics:
        metrics, facts[name] = run()
        return metrics

    return Case(name, measured)


def run_trl(script: Path, settings: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, Any]:
    """Run a script of `baselines/` with its settings and further environment variables; returns what it prints."""
    command = [harness.uv(), "run", "--quiet", "--no-project", "--python", sys.executable, "--with", TRL]
    for package in ("torch", "transformers"):
        command += ["--with", f"{package}=={importlib.metadata.version(package)}"]
    command += ["python", str(script), json.dumps(settings)]
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | dict(variables)
    return harness.run_json(command, env=environment)


@dataclass(frozen=True)
class JobRun:
    """Holds what a job of ours has left.

    Attributes:
        directory: its run directory.
        steps: the metrics of each step.
        arrivals: the `time.perf_counter()` at which the metrics of each step arrived.
        startup_s: seconds from the command to the end of the first step.
    """

    directory: Path
    steps: list[dict[str, Any]]
    arrivals: list[float]
    startup_s: float


@contextmanager
def job_run(
    script: Path, make_config: Callable[[str], Mapping[str, Any]], scratch: Path, overrides: Sequence[str]
) -> Iterator[JobRun]:
    """Run a job. Its directory is removed at the end of the block.

    Args:
        script: the job's script in `examples/`.
        make_config: returns the configuration for a run directory.
        scratch: directory for its files.
        overrides: further configuration.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix="run_") as directory:
        config = scratch / f"{script.stem}.yaml"
        config.write_text(json.dumps(make_config(directory)), encoding="utf-8")  # JSON is YAML
        command = [sys.executable, str(script), "--config", str(config), *overrides]
        started = time.perf_counter()
        metrics = Path(directory, "metrics.jsonl")
        with harness.watched_lines(metrics) as arrivals:
            # A separate cluster: an existing one may run other work.
            harness.run(command, cwd=scratch, env=os.environ | {"RAY_ADDRESS": "local"})
        steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        yield JobRun(Path(directory), steps, arrivals, arrivals[0] - started)
