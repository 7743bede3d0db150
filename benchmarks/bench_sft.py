"""Compares supervised fine-tuning by examples/run_sft.py with TRL's SFTTrainer: losses of all steps, tokens per second.

    uv run benchmarks/bench_sft.py                  # 3 rounds, 2 threads
    uv run benchmarks/bench_sft.py --cases ours trl --repeats 1

Both sides train the same Llama with 3.6 M parameters and random weights, from the same directory, on the same generated
chats (guessing games, and products with tool calls) in the same order: 60 steps of 32 conversations, float32, AdamW,
loss on the assistant's turns by the markers of the chat template. The benchmark compares the work of both sides (steps,
tokens, tokens in the loss), and rejects the result if it differs or if a loss of one of the first 50 steps differs by
more than 1e-4.

`ours, packed` lays the conversations of a step end to end; TRL pads them. `trl, passive` is TRL with
OMP_WAIT_POLICY=PASSIVE, which helps if other processes compute on the same cores. Take the faster of the two as the
baseline. TRL also computes the entropy and the accuracy of tokens in each step, which cannot be switched off.

Our side runs as users run it, with a worker in its venv behind Ray. TRL runs in one process, in an environment that
`uv run --with` creates. `tokens_per_s` is the number of tokens without padding of the counted steps, divided by the
wall-clock time from the end of the last warm-up step to the end of the last step.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
from harness import Ratio
from trl_comparison import BASELINES, Run, case, job_run, largest_difference, parse_arguments, run_trl, write_model

from nemo_rl.data.config import SFTDataConfig
from nemo_rl.data.conversations import load_conversations

BASELINE = Path(__file__).parent / "baselines" / "trl_sft.py"
JOB = harness.REPOSITORY / "examples" / "run_sft.py"
OURS = {
    "ours": (),
    "ours, packed": ("policy.batching.mode=packed", "policy.batching.max_tokens=2048"),
}
CASES = (*OURS, *BASELINES)
# Facts that must be equal for a comparison.
FACTS = ("steps", "tokens", "loss_tokens")
NUM_COMPARED, TOLERANCE = 50, 1e-4


@dataclass(frozen=True)
class Settings:
    """Holds the settings of both sides. The baseline reads them as JSON."""

    model: str
    data: str
    num_threads: int
    num_steps: int
    num_warmup_steps: int
    num_records: int = 32
    max_length: int = 64
    learning_rate: float = 5e-4


def main() -> None:
    arguments = parse_arguments(__doc__, CASES, steps=60)
    facts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="nemo_rl_bench_") as directory:
        model, data = Path(directory, "model"), Path(directory, "chats.jsonl")
        write_model(model)
        settings = Settings(str(model), str(data), arguments.threads, arguments.steps, arguments.warmup_steps)
        write_conversations(data, settings.num_steps * settings.num_records)

        runs: dict[str, Run] = {
            name: functools.partial(run_ours, settings, Path(directory), [*overrides, *arguments.overrides])
            for name, overrides in OURS.items()
        }
        runs |= {name: functools.partial(run_baseline, settings, variables) for name, variables in BASELINES.items()}
        cases = [case(name, runs[name], facts) for name in arguments.cases]
        results = harness.measure(cases, arguments.repeats)
    pairs = [(one, other) for one in arguments.cases if one in OURS for other in arguments.cases if other in BASELINES]
    differences = {
        f"{one} / {other}": largest_difference(facts[one], facts[other], FACTS, "losses", NUM_COMPARED, TOLERANCE)
        for one, other in pairs
    }
    work = {side: {name: values[name] for name in FACTS} for side, values in facts.items()}
    harness.report(
        "sft",
        results,
        [Ratio("tokens_per_s", one, other) for one, other in pairs],
        arguments.json,
        title=f"Supervised fine-tuning, {settings.num_records} conversations per step",
        notes=[f"work of {side}: {json.dumps(done)}" for side, done in work.items()]
        + [
            f"largest difference of the first {NUM_COMPARED} losses, {pair}: {d:.2e}" for pair, d in differences.items()
        ],
        details={
            "settings": {**asdict(settings), "model": "3.6 M parameters", "data": "generated dialogues"},
            "overrides": arguments.overrides,
            "facts": facts,
            "differences": differences,
        },
    )


def write_conversations(path: Path, count: int) -> None:
    """Write generated dialogues as JSON lines."""
    train, _ = load_conversations(SFTDataConfig(train={"max_num_records": count}))
    with path.open("w", encoding="utf-8") as file:
        for conversation in train:
            # As text, because a table has the same columns in all rows.
            tools = json.dumps(conversation.tools) if conversation.tools else None
            file.write(json.dumps({"messages": conversation.completion, "tools": tools}) + "\n")


def run_baseline(settings: Settings, variables: Mapping[str, str]) -> tuple[dict[str, float], dict[str, Any]]:
    """Run TRL. Returns its metrics and the facts about its work."""
    answer = run_trl(BASELINE, asdict(settings), variables)
    return {name: answer.pop(name) for name in ("tokens_per_s", "startup_s")}, answer


def run_ours(settings: Settings, scratch: Path, overrides: Sequence[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """Run our job. Returns its metrics and the facts about its work."""
    with job_run(JOB, functools.partial(job_config, settings), scratch, overrides) as job:
        steps, arrivals = job.steps, job.arrivals
        data = json.loads((job.directory / "data.json").read_text("utf-8"))["train"]
    tokens = [round(step["perf/tokens_per_s"] * step["timing/step_s"]) for step in steps]
    skip = settings.num_warmup_steps
    metrics = {
        "tokens_per_s": sum(tokens[skip:]) / (arrivals[-1] - arrivals[skip - 1]),
        "startup_s": job.startup_s,
    }
    facts = {
        "losses": [step["train/loss"] for step in steps],
        "steps": len(steps),
        "tokens": data["tokens"],
        "loss_tokens": data["loss_tokens"],
    }
    return metrics, facts


def job_config(settings: Settings, log_dir: str) -> dict[str, Any]:
    """Return the configuration of our side: defaults, except for the settings of the baseline."""
    return {
        "sft": {
            "max_num_epochs": 1,
            "num_records_per_step": settings.num_records,
        },
        "policy": {
            "model_name": settings.model,
            "num_threads": settings.num_threads,
            "max_sequence_length": settings.max_length,
            "train_micro_batch_size": settings.num_records,
            "optimizer": {"lr": settings.learning_rate, "betas": [0.9, 0.95]},
        },
        "data": {"train": {"path": settings.data}, "shuffle": False, "mask": "markers"},
        "checkpointing": {"enabled": False},
        "logger": {"log_dir": log_dir, "tensorboard": False, "report": False},
    }


if __name__ == "__main__":
    main()
