"""Runs TRL's GRPOTrainer on a given model and problems. Prints its times as a JSON object on the last line.

It runs in a separate environment and does not use this repository::

    uv run --no-project --with trl==1.16.0 --with torch==2.13.0 python benchmarks/baselines/trl_grpo.py '{"model": ...}'

Its settings make TRL fast here: no gradient checkpointing, no bf16 emulation, one optimizer step per generation, no
reference model, no checkpoints, no reporting.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time

SETTINGS = json.loads(sys.argv[1])
os.environ.update(
    HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(SETTINGS["num_threads"]), TOKENIZERS_PARALLELISM="false", NO_COLOR="1"
)

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402


class Clock(TrainerCallback):
    """Records the end of each optimizer step, and the seconds in `model.generate` and in the reward function so far."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.phases: list[dict[str, float]] = []
        self.spent = {"generation": 0.0, "reward": 0.0}

    def on_step_end(self, *unused: object, **kwargs: object) -> None:
        self.ends.append(time.perf_counter())
        self.phases.append(dict(self.spent))

    def timed(self, phase, function):
        def run(*args, **kwargs):
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[phase] += time.perf_counter() - started

        return run


def reward(completions: list[str], answer: list[str], **unused: object) -> list[float]:
    """Return 1 if the last digit of a completion is the answer, else 0."""
    digits = [[character for character in text if character.isdigit()] for text in completions]
    return [float(bool(row) and row[-1] == expected) for row, expected in zip(digits, answer)]


def trainer_config(directory: str) -> GRPOConfig:
    samples = SETTINGS["num_prompts"] * SETTINGS["num_generations"]
    return GRPOConfig(
        output_dir=directory,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=SETTINGS["num_steps"],
        per_device_train_batch_size=samples,
        gradient_accumulation_steps=1,
        num_generations=SETTINGS["num_generations"],
        max_completion_length=SETTINGS["max_new_tokens"],
        temperature=1.0,
        beta=0.0,
        epsilon=0.2,
        loss_type="dapo",
        scale_rewards="group",
        learning_rate=SETTINGS["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.999,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=SETTINGS["seed"],
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def main() -> None:
    torch.set_num_threads(SETTINGS["num_threads"])
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(SETTINGS["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SETTINGS["model"], padding_side="left")
    with open(SETTINGS["problems"], encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    prompts = [record["problem"] for record in records]
    dataset = Dataset.from_dict({"prompt": prompts, "answer": [record["answer"] for record in records]})
    clock = Clock()
    model.generate = clock.timed("generation", model.generate)
    timed_reward = clock.timed("reward", reward)
    timed_reward.__name__ = "reward"
    with tempfile.TemporaryDirectory() as directory:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=timed_reward,
            args=trainer_config(directory),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    print(json.dumps(summary(clock, trainer.state.log_history, started, tokenizer(prompts)["input_ids"])))


def summary(clock: Clock, history: list[dict], started: float, prompt_ids: list[list[int]]) -> dict:
    """Return the times after the warm-up steps, and facts about the work that was done."""
    skip, ends = SETTINGS["num_warmup_steps"], clock.ends
    steps = [after - before for before, after in zip(ends[skip - 1 :], ends[skip:])]
    phases = {
        name: statistics.median(
            after[name] - before[name] for before, after in zip(clock.phases[skip - 1 :], clock.phases[skip:])
        )
        for name in clock.spent
    }
    lines = [line for line in history if "completions/mean_length" in line]
    samples = SETTINGS["num_prompts"] * SETTINGS["num_generations"]
    return {
        "versions": {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "num_parameters": sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(SETTINGS["model"]).parameters()),
        "num_threads": torch.get_num_threads(),
        "steps": len(ends),
        "prompt_length": statistics.fmean(map(len, prompt_ids)),
        "completion_length_min": min(line["completions/min_length"] for line in lines),
        "completion_length_mean": statistics.fmean(line["completions/mean_length"] for line in lines),
        "reward_mean": statistics.fmean(line["reward"] for line in lines),
        "grad_norm_mean": statistics.fmean(line["grad_norm"] for line in lines),
        "startup_s": ends[0] - started,
        "step_s": statistics.median(steps),
        "samples_per_s": samples * len(steps) / (ends[-1] - ends[skip - 1]),
        "generation_s": phases["generation"],
        "reward_s": phases["reward"],
        "rest_s": statistics.median(steps) - phases["generation"] - phases["reward"],
    }


if __name__ == "__main__":
    main()
