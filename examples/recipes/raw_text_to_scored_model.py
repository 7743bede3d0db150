"""From raw text to a scored model: curates problems, fine-tunes a model on them, trains it with GRPO, and evaluates it.

uv run examples/recipes/raw_text_to_scored_model.py                                # needs no GPU and no download
uv run examples/recipes/raw_text_to_scored_model.py --output DIR curate:input.paths=[raw/] grpo:grpo.max_num_steps=200

    raw lines ──► curate ──► problems ─────────► sft ──► grpo ──► eval: initial model, after sft, after grpo
                        └──► held-out problems ──────────────────┘

`STAGE:key=value` sets a key of a stage's configuration. Interrupted or killed at any moment, the same command
continues: finished stages are skipped, and the job of the unfinished one resumes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_rl.jobs import curate_math, eval_job, grpo_job, sft_job
from nemo_rl.jobs.model_sources import find_model
from nemo_rl.utils.files import write_atomically

MODEL = "embedded"
FINISHED_FILE = "finished_stages.json"


@dataclass(frozen=True)
class Stage:
    """One job of the recipe.

    Attributes:
        name: its name, and that of its command: `nemo-rl NAME`.
        main: runs the command line of the job and returns its exit code.
        arguments: returns the command line. Called when all earlier stages are finished.
    """

    name: str
    main: Callable[[Sequence[str]], int]
    arguments: Callable[[], list[str]]


def recipe(output: Path) -> list[Stage]:
    """Return the stages. Each writes into a directory of its own in `output`."""
    curated, sft, grpo = output / "curated", output / "sft", output / "grpo"
    files = {"train": curated / "problems.parquet", "validation": curated / "held_out.parquet"}
    data = [f"data.{split}.path={path}" for split, path in files.items()]

    def curate() -> list[str]:
        # No pass rates: fine-tuning learns from problems of any difficulty, and GRPO chooses by itself.
        return ["--config", "curate_arithmetic", f"output_dir={curated}", "scoring.model=null"]

    def fine_tune() -> list[str]:
        keys = [f"data.{split}.{key}" for split in files for key in ("prompt_key=problem", "completion_key=answer")]
        return [
            *(f"logger.log_dir={sft}", f"policy.model_name={MODEL}", "policy.max_sequence_length=32"),
            *(*data, *keys, "data.train.max_num_records=null"),
            *("sft.num_records_per_step=128", "sft.max_num_epochs=10"),
        ]

    def train() -> list[str]:
        return [
            *(f"logger.log_dir={grpo}", f"policy.model_name={find_model(str(sft)).name}", *data),
            # Groups of completions that are all correct, or all wrong, are replaced: they have no learning signal.
            *("grpo.dynamic_sampling.enabled=true", "grpo.max_num_steps=150"),
        ]

    def evaluate() -> list[str]:
        models = [str(grpo), find_model(str(sft)).name, MODEL]
        return [*models, f"logger.log_dir={output / 'scores'}", "eval.num_generations=4"]

    return [
        Stage("curate", curate_math.main, curate),
        Stage("sft", sft_job.main, fine_tune),
        Stage("grpo", grpo_job.main, train),
        Stage("eval", eval_job.main, evaluate),
    ]


def run(stages: Sequence[Stage], output: Path, overrides: Sequence[str]) -> int:
    """Run the stages that are not finished. Return the exit code of the first that fails, or 0."""
    file = output / FINISHED_FILE
    finished = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    for number, stage in enumerate(stages, 1):
        title = f"stage {number} of {len(stages)}: nemo-rl {stage.name}"
        if stage.name in finished:
            print(f"{title} is finished", flush=True)
            continue
        prefix = f"{stage.name}:"
        arguments = stage.arguments() + [key.removeprefix(prefix) for key in overrides if key.startswith(prefix)]
        print(f"{title} {shlex.join(arguments)}", flush=True)
        if code := stage.main(arguments):
            return code
        finished.append(stage.name)
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(finished))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/raw_text_to_scored_model"), metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="STAGE:key=value")
    arguments = parser.parse_intermixed_args()
    stages = recipe(arguments.output)
    names = [stage.name for stage in stages]
    for override in arguments.overrides:
        if override.partition(":")[0] not in names:
            parser.error(
                f"{override!r} does not begin with the name of a stage and a colon; stages: {', '.join(names)}"
            )
    return run(stages, arguments.output, arguments.overrides)


if __name__ == "__main__":
    sys.exit(main())
