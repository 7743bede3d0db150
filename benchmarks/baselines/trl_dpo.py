"""Runs TRL's DPOTrainer on a given model and pairs. Prints losses and times as a JSON object on the last line.

It runs in a separate environment and does not use this repository::

    uv run --no-project --with trl==1.16.0 --with torch==2.13.0 python benchmarks/baselines/trl_dpo.py '{"model": ...}'

Its settings make TRL fast here: no gradient checkpointing, no bf16 emulation, no checkpoints, no reporting.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any

SETTINGS = json.loads(sys.argv[1])
os.environ.update(
    HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(SETTINGS["num_threads"]), TOKENIZERS_PARALLELISM="false", NO_COLOR="1"
)

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch.utils.data import SequentialSampler  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402


class Trainer(DPOTrainer):
    """Trains in the order of the data, and keeps the loss and the numbers of tokens of each step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.losses: list[float] = []
        self.num_tokens: list[int] = []
        self.num_loss_tokens: list[int] = []

    def _get_train_sampler(self, *unused: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def training_step(self, model, inputs, *others):
        self.num_tokens.append(int(inputs["attention_mask"].sum()))
        self.num_loss_tokens.append(int(inputs["completion_mask"].sum()))
        loss = super().training_step(model, inputs, *others)
        self.losses.append(float(loss))
        return loss


class Clock(transformers.TrainerCallback):
    """Records the end of each optimizer step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *unused: object, **kwargs: object) -> None:
        self.ends.append(time.perf_counter())


def trainer_config(directory: str) -> DPOConfig:
    return DPOConfig(
        output_dir=directory,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=SETTINGS["num_steps"],
        per_device_train_batch_size=SETTINGS["num_pairs"],
        gradient_accumulation_steps=1,
        precompute_ref_log_probs=True,
        loss_type=[SETTINGS["loss"]],
        label_smoothing=SETTINGS["label_smoothing"],
        beta=SETTINGS["beta"],
        max_length=SETTINGS["max_length"],
        learning_rate=SETTINGS["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def read_records() -> list[dict[str, Any]]:
    with open(SETTINGS["data"], encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main() -> None:
    torch.set_num_threads(SETTINGS["num_threads"])
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(SETTINGS["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SETTINGS["model"])
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            model=model,
            args=trainer_config(directory),
            train_dataset=Dataset.from_list(read_records()),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    skip, ends = SETTINGS["num_warmup_steps"], clock.ends
    summary = {
        "versions": {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "losses": trainer.losses,
        "grad_norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "steps": len(ends),
        "tokens": sum(trainer.num_tokens),
        "loss_tokens": sum(trainer.num_loss_tokens),
        "startup_s": ends[0] - started,
        "tokens_per_s": sum(trainer.num_tokens[skip:]) / (ends[-1] - ends[skip - 1]),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
