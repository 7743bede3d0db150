"""Compares direct preference optimization by examples/run_dpo.py with TRL's DPOTrainer: losses of all steps, tokens/s.

    uv run benchmarks/bench_dpo.py                      # 3 rounds, 2 threads
    uv run benchmarks/bench_dpo.py --repeats 1 --steps 20 --loss ipo

Both sides train the same Llama with 3.6 M parameters and random weights, from the same directory, on the same generated
pairs in the same order: 60 steps of 16 pairs, float32, AdamW. Both compute the reference policy's log-probabilities
before the first step. The benchmark compares the work of both sides (steps, tokens, tokens in the loss), and rejects
the result if it differs or if a loss or a gradient norm of one of the first 50 steps differs by more than 1e-4.

The cases are those of bench_sft.py. TRL also computes the entropy of tokens and the mean of logits in each step, which
cannot be switched off. `tokens_per_s` is the number of tokens without padding of the counted steps, divided by the
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

from nemo_rl.data.config import PreferenceDataConfig
from nemo_rl.data.preferences import load_preferences

BASELINE = Path(__file__).parent / "baselines" / "trl_dpo.py"
JOB = harness.REPOSITORY / "examples" / "run_dpo.py"
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
    loss: str
    label_smoothing: float
    beta: float = 0.5
    num_pairs: int = 16
    max_length: int = 64
    learning_rate: float = 5e-4


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        CASES,
        steps=60,
        options={
            "--loss": {"choices": ("sigmoid", "ipo"), "default": "sigmoid"},
            "--label-smoothing": {"type": float, "default": 0.0},
        },
    )
    facts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="nemo_rl_bench_") as directory:
        model, data = Path(directory, "model"), Path(directory, "pairs.jsonl")
        write_model(model)
        settings = Settings(
            str(model),
            str(data),
            arguments.threads,
            arguments.steps,
            arguments.warmup_steps,
            arguments.loss,
            arguments.label_smoothing,
        )
        write_pairs(data, settings.num_steps * settings.num_pairs)

        runs: dict[str, Run] = {
            name: functools.partial(run_ours, settings, Path(directory), [*overrides, *arguments.overrides])
            for name, overrides in OURS.items()
        }
        runs |= {name: functools.partial(run_baseline, settings, variables) for name, variables in BASELINES.items()}
        cases = [case(name, runs[name], facts) for name in arguments.cases]
        results = harness.measure(cases, arguments.repeats)
    pairs = [(one, other) for one in arguments.cases if one in OURS for other in arguments.cases if other in BASELINES]
    differences = {
        f"{what}, {one} / {other}": largest_difference(facts[one], facts[other], FACTS, what, NUM_COMPARED, TOLERANCE)
        for one, other in pairs
        for what in ("losses", "grad_norms")
    }
    work = {side: {name: values[name] for name in FACTS} for side, values in facts.items()}
    harness.report(
        "dpo",
        results,
        [Ratio("tokens_per_s", one, other) for one, other in pairs],
        arguments.json,
        title=f"Direct preference optimization, {settings.num_pairs} pairs per step, loss {settings.loss}",
        notes=[f"work of {side}: {json.dumps(done)}" for side, done in work.items()]
        + [f"largest difference of the first {NUM_COMPARED} {pair}: {d:.2e}" for pair, d in differences.items()],
        details={
            "settings": {**asdict(settings), "model": "3.6 M parameters", "data": "generated pairs"},
            "overrides": arguments.overrides,
            "facts": facts,
            "differences": differences,
        },
    )


def write_pairs(path: Path, count: int) -> None:
    """Write generated pairs as JSON lines."""
    train, _ = load_preferences(PreferenceDataConfig(train={"max_num_records": count}))
    with path.open("w", encoding="utf-8") as file:
        for pair in train:
            record = {
                "prompt": pair.chosen.prompt,
                "chosen": pair.chosen.completion,
                "rejected": pair.rejected.completion,
                # As text, because a table has the same columns in all rows.
                "tools": json.dumps(pair.chosen.tools) if pair.chosen.tools else None,
            }
            file.write(json.dumps(record) + "\n")


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
        "grad_norms": [step["train/grad_norm"] for step in steps],
        "steps": len(steps),
        "tokens": data["tokens"],
        "loss_tokens": data["loss_tokens"],
    }
    return metrics, facts


def job_config(settings: Settings, log_dir: str) -> dict[str, Any]:
    """Return the configuration of our side: defaults, except for the settings of the baseline."""
    return {
        "dpo": {
            "max_num_epochs": 1,
            "num_records_per_step": settings.num_pairs,
            "loss": settings.loss,
            "label_smoothing": settings.label_smoothing,
            "beta": settings.beta,
        },
        "policy": {
            "model_name": settings.model,
            "num_threads": settings.num_threads,
            "max_sequence_length": settings.max_length,
            "train_micro_batch_size": 2 * settings.num_pairs,
            "optimizer": {"lr": settings.learning_rate, "betas": [0.9, 0.95]},
        },
        "data": {"train": {"path": settings.data}, "shuffle": False},
        "checkpointing": {"enabled": False},
        "logger": {"log_dir": log_dir, "tensorboard": False, "report": False},
    }


if __name__ == "__main__":
    main()
