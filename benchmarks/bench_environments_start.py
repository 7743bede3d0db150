"""Measures the time from the command to the first training step, with one environment and with ten.

    uv run benchmarks/bench_environments_start.py

The job trains the embedded chat model on a guessing game. Each environment has a venv of its own: the driver's packages
and one version of a small package. All venvs are built, and the model is made, before the first round. Every round is a
new process with a new local Ray cluster. The number of samples per step does not depend on the case.

| case | environments | venvs |
| --- | --- | --- |
| one | 1 | 1 |
| ten | 10 | 10 |
| ten, one venv | 10 | 1 |
| ten, child processes | 10, with `own_process` | 10 |
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
from harness import Case, Metrics, Ratio

from nemo_rl.observability.critical_path import critical_path, startup_events
from nemo_rl.observability.timer import FIRST_STEP, read_timeline
from nemo_rl.utils.jsonl import read_jsonl

JOB = harness.REPOSITORY / "examples" / "run_grpo_math.py"
GAME = "nemo_rl.environments.games.GuessNumber"
STEP_S = "timing/step_s"
PACKAGE = "more-itertools"
VERSIONS = ("8.10.0", "8.12.0", "8.13.0", "8.14.0", "9.0.0", "9.1.0", "10.1.0", "10.2.0", "10.4.0", "10.5.0")
CASES: dict[str, tuple[Sequence[str], bool]] = {
    "one": (VERSIONS[:1], False),
    "ten": (VERSIONS, False),
    "ten, one venv": (VERSIONS[:1] * len(VERSIONS), False),
    "ten, child processes": (VERSIONS, True),
}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["one", "ten"], help="default: one ten")
    parser.add_argument("--show-path", action="store_true", help="print the critical path of every start")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nemo_rl_bench_") as directory:
        scratch = Path(directory)
        cases = [
            Case(name, lambda name=name: _start(scratch, *CASES[name], show_path=arguments.show_path))
            for name in arguments.cases
        ]
        results = harness.measure(cases, arguments.repeats, warmups=1)
    ratios = [
        Ratio("until the first step, s", name, "one", at_most=1.3 if name == "ten" else None)
        for name in arguments.cases
        if name != "one" and "one" in arguments.cases
    ]
    harness.report("environments_start", results, ratios, arguments.json)


def _start(scratch: Path, versions: Sequence[str], own_process: bool, *, show_path: bool) -> Metrics:
    """Run a job of one step, and return the seconds from the command to the begin and the end of the step."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix="run_") as directory:
        config = Path(directory, "start.yaml")
        config.write_text(json.dumps(_config(versions, own_process, directory)), encoding="utf-8")  # JSON is YAML
        # A separate cluster: an existing one may run other work.
        variables = {"RAY_ADDRESS": "local", "NEMO_RL_VENV_DIR": str(scratch / "venvs")}
        started = time.time()
        harness.run([sys.executable, str(JOB), "--config", str(config)], env=os.environ | variables)
        events = read_timeline(Path(directory))
        [step_s] = [line[STEP_S] for line in read_jsonl(Path(directory, "metrics.jsonl")) if STEP_S in line]
        [first_step] = [event.end for event in events if event.name == FIRST_STEP]
        if show_path:
            for segment in critical_path(*startup_events(events)):
                sys.stderr.write(f"{segment.end - segment.start:7.2f} s  {segment.process}: {segment.name}\n")
    return {"until the first step, s": first_step - started, "of the first step, s": step_s}


def _config(versions: Sequence[str], own_process: bool, log_dir: str) -> dict[str, Any]:
    environments = {
        f"game{index}": {
            "class": GAME,
            "max_turns": 6,
            "data": {"train": {"kind": "seeds"}},
            "runtime_env": {"uv": [f"{PACKAGE}=={version}"]},
            "own_process": own_process,
        }
        for index, version in enumerate(versions)
    }
    return {
        "grpo": {
            "max_num_steps": 1,
            "num_prompts_per_step": 10,
            "num_generations_per_prompt": 4,
            "validation": {"at_start": False, "period": 0},
        },
        "policy": {
            "model_name": "embedded-chat",
            "max_sequence_length": 128,
            "generation": {"max_new_tokens": 24},
        },
        "env": environments,
        "checkpointing": {"enabled": False},
        "logger": {"log_dir": log_dir, "tensorboard": False, "report": False},
    }


if __name__ == "__main__":
    main()
