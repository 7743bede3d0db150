"""Compares GRPO steps of the job in examples/run_grpo_math.py with TRL's GRPOTrainer, on a tiny model.

    uv run benchmarks/bench_grpo_step.py                  # 3 rounds, 2 threads
    uv run benchmarks/bench_grpo_step.py --cases trl      # one side
    uv run benchmarks/bench_grpo_step.py --busy 1         # while another process computes on the same cores

Both sides train the same Llama with 624 k parameters (tiny_llama.py), from the same directory, on the same prompts:
8 prompts x 8 completions of exactly 32 tokens, float32, one AdamW step over all 64 samples, no reference model. The
benchmark compares the work of both sides (parameters, steps, lengths of prompts and completions) and rejects the result
if it differs.

Our side also runs with two data-parallel workers of one thread each, and asynchronously: one thread trains while the
other generates the completions of the next step. `trl, passive` is TRL with OMP_WAIT_POLICY=PASSIVE: waiting threads
sleep instead of spinning. This helps if other processes compute on the same cores; on an idle machine it should not.
Take the faster of the two as the baseline. With `--busy`, processes that only compute compete for the cores with both
sides, at the same priority.

Our side runs as users run it, with workers in their venvs behind Ray. TRL runs in one process, in an environment that
`uv run --with` creates. Times exclude the warm-up steps. `samples_per_s` is the number of samples divided by the
wall-clock time from the end of the last warm-up step to the end of the last step, so it includes the time between
steps.

The floor in the notes is the time of the matrix products of a step at the rate of such products, measured in the same
run: 2 FLOPs per weight and token in generation, 6 in training, each prompt once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import tiny_llama
import torch
from harness import Ratio
from transformers import AutoTokenizer
from trl_comparison import BASELINES, Run, case, job_run, parse_arguments, run_trl

from nemo_rl.models import onednn

BASELINE = Path(__file__).parent / "baselines" / "trl_grpo.py"
JOB = harness.REPOSITORY / "examples" / "run_grpo_math.py"
NUM_PROBLEMS = 64
# Configurations that distribute our side over the same threads, and at least how many times as fast as TRL they are to
# be. With `--busy`, all are to be at least as fast.
ONE_THREAD = ("policy.num_threads=1",)
OURS = {
    "ours": (),
    "ours, 2 workers": (*ONE_THREAD, "cluster.cpu_workers_per_node=2", "policy.train_micro_batch_size=32"),
    "ours, async": (
        *ONE_THREAD,
        "policy.generation.num_threads=1",
        "grpo.max_trajectory_age=1",
        "cluster.generation.cpu_workers_per_node=1",
    ),
}
GOALS = {"ours": 2.0, "ours, 2 workers": 2.0, "ours, async": 2.5}
CASES = (*OURS, *BASELINES)
# Facts that must be equal for a comparison.
FACTS = ("num_parameters", "prompt_length", "completion_length_mean", "steps")


@dataclass(frozen=True)
class Settings:
    """Holds the settings of both sides. The baseline reads them as JSON."""

    model: str
    problems: str
    num_threads: int
    num_steps: int
    num_warmup_steps: int
    num_prompts: int = 8
    num_generations: int = 8
    max_new_tokens: int = 32
    learning_rate: float = 1e-5
    seed: int = 0

    @property
    def num_samples(self) -> int:
        """Number of samples per step."""
        return self.num_prompts * self.num_generations


def main() -> None:
    busy = {"type": int, "default": 0, "metavar": "N", "help": "processes that compute on the same cores (default: 0)"}
    arguments = parse_arguments(__doc__, CASES, steps=40, options={"--busy": busy})
    facts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="nemo_rl_bench_") as directory:
        model, problems = Path(directory, "model"), Path(directory, "problems.jsonl")
        num_parameters = tiny_llama.make_model(model)
        tiny_llama.write_problems(problems, NUM_PROBLEMS)
        settings = Settings(str(model), str(problems), arguments.threads, arguments.steps, arguments.warmup_steps)

        runs: dict[str, Run] = {
            name: functools.partial(run_ours, settings, Path(directory), [*overrides, *arguments.overrides])
            for name, overrides in OURS.items()
        }
        runs |= {name: functools.partial(run_baseline, settings, variables) for name, variables in BASELINES.items()}
        cases = [case(name, runs[name], facts) for name in arguments.cases]
        with busy_processes(arguments.busy):
            results = harness.measure(cases, arguments.repeats)
        floor = floor_note(settings, num_parameters)
    ours_cases = [name for name in arguments.cases if name in OURS]
    for name in ours_cases:
        facts[name]["num_parameters"] = num_parameters
    pairs = [(name, baseline) for baseline in arguments.cases if baseline in BASELINES for name in ours_cases]
    pairs += [(name, "ours") for name in ours_cases if name != "ours" and "ours" in ours_cases]
    for name, baseline in pairs:
        check_equal_work(facts[name], facts[baseline])
    harness.report(
        "grpo_step",
        results,
        [
            Ratio("samples_per_s", name, baseline, at_least=goal(name, baseline, arguments.busy))
            for name, baseline in pairs
        ],
        arguments.json,
        title=f"A GRPO step of {settings.num_prompts} prompts x {settings.num_generations} completions",
        notes=[floor, *(f"work of {side}: {json.dumps(work)}" for side, work in facts.items())],
        details={
            "settings": {**asdict(settings), "model": "tiny_llama.py", "problems": NUM_PROBLEMS},
            "overrides": arguments.overrides,
            "busy": arguments.busy,
            "facts": facts,
        },
    )


def goal(name: str, baseline: str, num_busy: int) -> float | None:
    """Return the least ratio that a case of ours is to reach; None against another case of ours."""
    if baseline in OURS:
        return None
    return 1.0 if num_busy else GOALS[name]


def floor_note(settings: Settings, num_parameters: int) -> str:
    """Say how long the matrix products of a step take at the measured rate."""
    rate = max(product_rate(torch.nn.functional.linear, settings.num_threads), _onednn_rate(settings.num_threads))
    tokens = settings.num_prompts * tiny_llama.PROMPT_LENGTH + settings.num_samples * settings.max_new_tokens
    flops = 8 * (num_parameters - tiny_llama.NUM_EMBEDDINGS) * tokens
    return (
        f"floor: {flops / 1e9:.2f} GFLOP in matrix products per step, {flops / rate:.3f} s at {rate / 1e9:.0f} GFLOP/s "
        f"(products of 2048 x 128 and 128 x 512, {settings.num_threads} threads)"
    )


def product_rate(linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], num_threads: int) -> float:
    """Return the FLOP/s of a function that multiplies x [N, in] by the transpose of w [out, in]; best of 50."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    x, w = torch.randn(2048, 128), torch.randn(512, 128)
    best = min(timeit.repeat(lambda: linear(x, w), number=4, repeat=50)) / 4
    torch.set_num_threads(before)
    return 2 * x.numel() * len(w) / best


def _onednn_rate(num_threads: int) -> float:
    if not onednn.is_usable(torch.float32):
        return 0.0
    return product_rate(lambda x, w: onednn.linear(x, w, None), num_threads)


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Let processes compute for the time of the block, on the cores of this process."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def check_equal_work(ours: Mapping[str, Any], baseline: Mapping[str, Any]) -> None:
    """Exit if the two sides did different work."""
    unequal = [name for name in FACTS if ours[name] != baseline[name]]
    if unequal:
        raise SystemExit(f"not comparable, {', '.join(unequal)} differ: {json.dumps([ours, baseline])}")


def run_baseline(settings: Settings, variables: Mapping[str, str]) -> tuple[dict[str, float], dict[str, Any]]:
    """Run TRL. Returns its metrics and the facts about its work."""
    answer = run_trl(BASELINE, asdict(settings), variables)
    metrics = {name: answer[name] for name in ("samples_per_s", "step_s", "startup_s")}
    metrics |= {f"phase {name}": answer[name] for name in ("generation_s", "reward_s", "rest_s")}
    facts = {name: value for name, value in answer.items() if not name.endswith("_s")}
    return metrics, facts


def run_ours(settings: Settings, scratch: Path, overrides: Sequence[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """Run our job. Returns its metrics and the facts about its work."""
    with job_run(JOB, functools.partial(job_config, settings), scratch, overrides) as job:
        steps, arrivals = job.steps, job.arrivals
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    problems = [json.loads(line)["problem"] for line in Path(settings.problems).read_text("utf-8").splitlines()]
    counted = steps[settings.num_warmup_steps :]
    wall = arrivals[-1] - arrivals[settings.num_warmup_steps - 1]
    timings = dict.fromkeys(name for step in counted for name in step if name.startswith("timing/"))
    phases = {name: statistics.median(step.get(name, 0.0) for step in counted) for name in timings}
    step_s = phases.pop("timing/step_s")
    metrics = {
        "samples_per_s": settings.num_samples * len(counted) / wall,
        "step_s": step_s,
        "startup_s": job.startup_s,
        **{f"phase {name.removeprefix('timing/')}": seconds for name, seconds in phases.items()},
    }
    # The time between the phases of a step, and between steps.
    top_level = [seconds for name, seconds in phases.items() if "/" not in name.removeprefix("timing/")]
    metrics["phase rest_s"] = wall / len(counted) - sum(top_level)
    facts = {
        "steps": len(steps),
        "prompt_length": statistics.fmean(map(len, tokenizer(problems)["input_ids"])),
        "completion_length_mean": statistics.fmean(step["train/completion_length"] for step in steps),
        "reward_mean": statistics.fmean(step["train/reward"] for step in steps),
        "grad_norm_mean": statistics.fmean(step["train/grad_norm"] for step in steps),
    }
    return metrics, facts


def job_config(settings: Settings, log_dir: str) -> dict[str, Any]:
    """Return the configuration of our side: defaults, except for the settings of the baseline."""
    return {
        "grpo": {
            "seed": settings.seed,
            "max_num_steps": settings.num_steps,
            "num_prompts_per_step": settings.num_prompts,
            "num_generations_per_prompt": settings.num_generations,
            "advantage": {"baseline": "mean", "normalize_std": True},
        },
        "policy": {
            "model_name": settings.model,
            "num_threads": settings.num_threads,
            "max_sequence_length": 64,
            "train_micro_batch_size": settings.num_samples,
            "optimizer": {"lr": settings.learning_rate},
            "generation": {"max_new_tokens": settings.max_new_tokens},
        },
        "data": {"train": {"path": settings.problems}, "max_prompt_length": 32},
        "env": {"math": {"answer_format": "last_number"}},
        "cluster": {"cpu_workers_per_node": 1},
        "checkpointing": {"enabled": False},
        "logger": {"log_dir": log_dir, "tensorboard": False, "report": False},
    }


if __name__ == "__main__":
    main()
