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

from nemo_rl.models.embedded import make_model, make_tokenizer
from nemo_rl.models.policy.config import EMBEDDED_CHAT_MODEL, EmbeddedModelConfig

TRL = "trl==1.16.0"
# Environment variables of TRL, by case. Passive: waiting threads sleep instead of spinning.
BASELINES: dict[str, Mapping[str, str]] = {"trl": {}, "trl, passive": {"OMP_WAIT_POLICY": "PASSIVE"}}

Facts = dict[str, Any]
# Runs one side once; returns its metrics and the facts about its work.
Run = Callable[[], tuple[Metrics, Facts]]


def parse_arguments(
    description: str | None,
    cases: Sequence[str],
    *,
    steps: int,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> argparse.Namespace:
    """Parse the command line, and restrict this process and its children to the given number of cores.

    Args:
        description: text for the help.
        cases: names of all cases.
        steps: default number of steps.
        options: further options, with their arguments of `add_argument`.
    """
    parser = harness.parser(description)
    for option, settings in (options or {}).items():
        parser.add_argument(option, **settings)
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


def largest_difference(
    ours: Facts, baseline: Facts, equal: Sequence[str], values: str, count: int, tolerance: float
) -> float:
    """Return the largest difference of the first `count` values of each step. Exit if both sides are not comparable.

    Args:
        ours: facts of our side.
        baseline: facts of TRL.
        equal: names of facts that must be equal.
        values: name of the fact with a value per step.
        count: number of steps to compare.
        tolerance: largest allowed difference.
    """
    unequal = [name for name in equal if ours[name] != baseline[name]]
    if unequal:
        both = [{name: side[name] for name in equal} for side in (ours, baseline)]
        raise SystemExit(f"not comparable, {', '.join(unequal)} differ: {json.dumps(both)}")
    pairs = list(zip(ours[values], baseline[values], strict=True))[:count]
    largest = max(abs(one - other) for one, other in pairs)
    if not largest <= tolerance:
        raise SystemExit(f"the {values} differ by up to {largest:.2e}: {pairs}")
    return largest


def write_model(directory: Path) -> None:
    """Write a Llama with random weights, and the tokenizer of the embedded chat model with markers in its template."""
    tokenizer = make_tokenizer(EMBEDDED_CHAT_MODEL)
    config = EmbeddedModelConfig(hidden_size=256, num_layers=4, num_attention_heads=8)
    make_model(config, tokenizer).save_pretrained(directory)
    tokenizer.chat_template = with_markers(tokenizer.chat_template)
    tokenizer.save_pretrained(directory)


def with_markers(template: str) -> str:
    """Enclose the assistant's turns of the embedded template in the markers that transformers knows."""
    start = "{{- '<|' + message.role + '|>' + (message.content or '') }}"
    end = "    {{- '<|end|>' }}\n{%- endfor %}"
    assert template.count(start) == template.count(end) == 1
    head, _, rest = template.partition(start)
    turn, _, tail = rest.partition(end)
    body = f"{{{{- message.content or '' }}}}{turn}    {{{{- '<|end|>' }}}}"
    marked = f"{{%- generation %}}{body}{{%- endgeneration %}}"
    role = "{{- '<|' + message.role + '|>' }}"
    choice = f"{{%- if message.role == 'assistant' %}}{marked}{{%- else %}}{body}{{%- endif %}}"
    return f"{head}{role}{choice}\n{{%- endfor %}}{tail}"
