"""The training loop of supervised fine-tuning, with a policy in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_rl.algorithms.loss_functions import NLLLoss
from nemo_rl.algorithms.record_training import restore_data_position
from nemo_rl.algorithms.sft import SFT
from nemo_rl.algorithms.sft_config import SFTJobConfig
from nemo_rl.data.conversation_encoder import TokenizedConversation
from nemo_rl.data.supervised import collate_conversations
from nemo_rl.data.tokenized_examples import ExampleLoader
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import CheckpointError, ConfigError
from nemo_rl.models.policy.interfaces import TrainResult
from nemo_rl.utils.checkpoint import CheckpointStore
from nemo_rl.utils.config import load_config


class Conversations(list[TokenizedConversation]):
    """Ten conversations of three tokens, the last two of which are in the loss."""

    items = "conversations"

    def __init__(self, digest: str = "a") -> None:
        self.digest = digest
        mask = np.array([False, True, True])
        super().__init__(TokenizedConversation(np.array([i, i, i], dtype=np.int32), mask) for i in range(10))


@dataclass
class FakePolicy:
    """Has one weight, the loss of every token. It falls by one hundredth of the mean token of a batch."""

    weight: float = 5.0
    batches: list[list[int]] = field(default_factory=list)

    def get_logprobs(self, batch: BatchedDataDict) -> torch.Tensor:
        return torch.full(batch["input_ids"].shape, -self.weight)

    def train(self, batch: BatchedDataDict, loss_fn: Any) -> TrainResult:
        assert isinstance(loss_fn, NLLLoss)
        self.batches.append(batch["input_ids"][:, 0].tolist())
        loss = self.weight
        self.weight -= 0.01 * float(batch["input_ids"].float().mean())
        return TrainResult({"loss": loss, "grad_norm": 1.0}, num_tokens=batch["input_ids"].numel())

    def save_checkpoint(self, directory: Path) -> None:
        directory.mkdir()
        (directory / "weight").write_text(repr(self.weight))

    def load_checkpoint(self, directory: Path) -> None:
        self.weight = float((directory / "weight").read_text())


@dataclass
class Records:
    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        skip = ("timing/", "perf/")
        self.metrics.append((step, {name: value for name, value in metrics.items() if not name.startswith(skip)}))

    def steps_with(self, name: str) -> list[int]:
        return [step for step, metrics in self.metrics if name in metrics]


def job(*overrides: str) -> SFTJobConfig:
    defaults = ["sft.num_records_per_step=4", "sft.validation.period=2", "checkpointing.save_period=1"]
    return load_config(SFTJobConfig, None, [*defaults, *overrides])


def loop(config: SFTJobConfig, directory: Path | None = None, digest: str = "a", **options: Any) -> SFT:
    conversations: Any = Conversations(digest)
    sft = config.sft
    return SFT(
        config=config,
        policy=FakePolicy(),  # type: ignore[arg-type]
        loader=ExampleLoader(
            conversations,
            lambda rows: collate_conversations(rows, 0),
            seed=sft.seed,
            num_epochs=sft.max_num_epochs,
        ),
        validation=collate_conversations(conversations[:3], 0, row_multiple=2),
        recorder=Records(),
        checkpoints=None if directory is None else CheckpointStore(directory, config.checkpointing),
        **options,
    )


def test_run_trains_epochs_and_validates() -> None:
    sft = loop(job("sft.max_num_epochs=2"))
    assert sft.run() == "all 2 epochs are done"
    records = sft.recorder
    assert records.steps_with("train/loss") == [1, 2, 3, 4, 5]
    assert records.steps_with("val/loss") == [0, 2, 4, 5]
    assert records.metrics[0] == (0, {"val/loss": 5.0})
    epochs = [metrics["train/epoch"] for _, metrics in records.metrics if "train/epoch" in metrics]
    assert epochs == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    drawn = [row for batch in sft.policy.batches for row in batch]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))


def test_steps_limit_the_run() -> None:
    sft = loop(job("sft.max_num_steps=3", "sft.max_num_epochs=null"))
    assert sft.run() == "all 3 steps are done"
    assert sft.step == 3


@pytest.mark.parametrize("killed_after", [1, 2, 3, 4])
def test_resumed_run_equals_an_uninterrupted_run(tmp_path: Path, killed_after: int) -> None:
    config = job("sft.max_num_epochs=2")
    expected = loop(config, tmp_path / "whole")
    expected.run()
    first = loop(job("sft.max_num_epochs=2", f"sft.max_num_steps={killed_after}"), tmp_path / "parts")
    first.run()
    checkpoint = CheckpointStore(tmp_path / "parts", config.checkpointing).latest()
    assert checkpoint is not None
    assert checkpoint.step == killed_after
    second = loop(config, tmp_path / "parts")
    second.resume(checkpoint)
    assert second.run() == "all 2 epochs are done"
    assert second.policy.weight == expected.policy.weight
    assert first.policy.batches + second.policy.batches == expected.policy.batches
    trained = [entry for entry in expected.recorder.metrics if "train/loss" in entry[1]]
    assert [entry for entry in second.recorder.metrics if "train/loss" in entry[1]] == trained[killed_after:]


def test_best_checkpoint_has_the_lowest_validation_loss(tmp_path: Path) -> None:
    config = job("checkpointing.keep_top_k=1")
    loop(config, tmp_path).run()
    best = CheckpointStore(tmp_path, config.checkpointing).best()
    assert best is not None
    assert best.step == 2


def test_unknown_metric_is_refused_before_the_first_step() -> None:
    sft = loop(job("checkpointing.metric_name=val/los"))
    with pytest.raises(ConfigError, match="checkpointing.metric_name=val/los is not measured. Did you mean 'val/loss'"):
        sft.run()
    assert sft.step == 0


def test_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    config = job("sft.max_num_steps=1")
    loop(config, tmp_path).run()
    checkpoint = CheckpointStore(tmp_path, config.checkpointing).latest()
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match="belongs to other data: digest was 'a' and is now 'b'.* remove"):
        restore_data_position(loop(config, digest="b").loader, checkpoint)


def test_rows_outside_the_samples_do_not_change_the_validation_loss() -> None:
    sft = loop(job())
    logprobs = torch.tensor([[9.0, -1.0, -2.0], [9.0, -3.0, -4.0], [9.0, -5.0, -6.0], [9.0, -70.0, math.nan]])
    sft.policy.get_logprobs = lambda batch: logprobs  # type: ignore[method-assign]
    sft._validate()
    assert sft.recorder.metrics == [(0, {"val/loss": 3.5})]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sft.max_num_epochs=null"], "sft: max_num_steps and max_num_epochs are both null; set one of them"),
        (["cluster.cpu_workers_per_node=3"], "4 samples per optimizer step cannot be split evenly over 3"),
        (["policy.train_global_batch_size=3"], r"sft.num_records_per_step \(4\) is not a multiple"),
        (["cluster.generation.num_nodes=1"], "cluster.generation has no use in supervised fine-tuning"),
        (["policy.batching.mode=packed", "policy.batching.max_tokens=100"], "less than one sequence"),
        (["grpo.seed=1"], "unknown key grpo"),
    ],
)
def test_invalid_configuration_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(*overrides)


def test_temperature_of_generation_does_not_change_training() -> None:
    config = job("policy.generation.temperature=0.5")
    assert config.trained_policy.generation.temperature == 1.0
    assert config.trained_policy.max_sequence_length == config.policy.max_sequence_length
