"""The training loop of distillation with in-memory parts, and its configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_grpo import PAD, FakeEnvironment, FakeGeneration, FakeLoader, FakePolicy, Recorder, problems, without_timings

from nemo_rl.algorithms.distillation import Distillation
from nemo_rl.algorithms.distillation_config import DistillationJobConfig
from nemo_rl.algorithms.distillation_losses import SampledTokensLoss, TopTokensLoss
from nemo_rl.algorithms.eval_config import EvalConfig, from_training
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import ConfigError, WorkerError
from nemo_rl.models.policy.interfaces import TrainResult
from nemo_rl.utils.checkpoint import CheckpointStore
from nemo_rl.utils.config import dump_yaml, load_config


@dataclass
class FakeStudent(FakePolicy):
    """Grows by what its teacher says about the sampled tokens."""

    losses: list[Any] = field(default_factory=list)

    def train(self, batch: BatchedDataDict, loss_fn: Any, *, batch_size: int | None = None) -> TrainResult:
        assert "advantages" not in batch, "rewards are only measured"
        self.batches.append(batch)
        self.losses.append(loss_fn)
        signal = batch["teacher_logprobs"] if "teacher_logprobs" in batch else batch["teacher_top_logprobs"][..., 0]
        self.skill += 0.001 * float((signal * batch["token_mask"]).abs().mean())
        return TrainResult({"loss": -self.skill, "grad_norm": 1.0, "kl_to_teacher": 1.0})


@dataclass
class FakeTeacher:
    """Dies in call `dies_in`, if that is not 0."""

    dies_in: int = 0
    num_calls: int = 0

    def get_logprobs(self, batch: BatchedDataDict) -> torch.Tensor:
        self.num_calls += 1
        if self.num_calls == self.dies_in:
            raise WorkerError("the teacher died")
        return -0.1 * batch["input_ids"].float()

    def get_top_logprobs(self, batch: BatchedDataDict, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = batch["input_ids"].shape
        return torch.arange(k, dtype=torch.int32).expand(*shape, k), torch.full((*shape, k + 1), -1.0)


def job(*overrides: str) -> DistillationJobConfig:
    sizes = ["distillation.num_prompts_per_step=4", "distillation.num_generations_per_prompt=4"]
    return load_config(DistillationJobConfig, None, [*sizes, "distillation.max_num_steps=6", *overrides])


def loop(config: DistillationJobConfig, directory: Path | None = None, dies_in: int = 0) -> Distillation:
    return Distillation(
        config=config,
        policy=FakeStudent(),
        generation=FakeGeneration(),
        environment=FakeEnvironment(),
        loader=FakeLoader(),
        validation=problems(8),
        recorder=Recorder(),
        checkpoints=CheckpointStore(directory, config.checkpointing) if directory else None,
        pad_token_id=PAD,
        teacher=FakeTeacher(dies_in),  # type: ignore[arg-type]
    )


def test_student_learns_from_the_teacher_and_measures_rewards() -> None:
    distillation = loop(job())
    assert distillation.run() == "all 6 steps are done"
    [batch, *_] = distillation.policy.batches
    assert batch["teacher_logprobs"].equal(-0.1 * batch["input_ids"].float())
    assert isinstance(distillation.policy.losses[0], SampledTokensLoss)
    steps = [record for record in distillation.recorder.metrics if "train/loss" in record]
    assert len(steps) == 6
    assert {"train/reward", "train/kl_to_teacher", "timing/teacher_s", "train/logprob_error"} <= steps[0].keys()
    assert any("val/accuracy" in record for record in distillation.recorder.metrics)


def test_top_k_asks_the_teacher_for_its_most_probable_tokens() -> None:
    distillation = loop(job("distillation.objective=top_k", "distillation.top_k=3", "distillation.beta=0"))
    distillation.run()
    [batch, *_] = distillation.policy.batches
    assert batch["top_ids"].shape == (*batch["input_ids"].shape, 3)
    assert batch["teacher_top_logprobs"].shape == (*batch["input_ids"].shape, 4)
    assert "teacher_logprobs" not in batch
    assert isinstance(distillation.policy.losses[0], TopTokensLoss)


@pytest.mark.parametrize(("objective", "needed"), [("sampled", True), ("top_k", False)])
def test_several_updates_have_the_log_probabilities_before_the_first(objective: str, needed: bool) -> None:
    updates = ("distillation.num_updates_per_step=2", "distillation.max_num_steps=1")
    distillation = loop(job(*updates, f"distillation.objective={objective}"))
    distillation.run()
    assert len(distillation.policy.batches) == 2
    assert all(("prev_logprobs" in batch) == needed for batch in distillation.policy.batches)


@pytest.mark.parametrize("age", [0, 1])
def test_resumed_run_equals_an_uninterrupted_run(tmp_path: Path, age: int) -> None:
    overrides = [f"distillation.max_trajectory_age={age}", "checkpointing.save_period=1"]
    whole = loop(job(*overrides), tmp_path / "whole")
    whole.run()
    with pytest.raises(WorkerError):
        loop(job(*overrides), tmp_path / "parts", dies_in=4).run()
    second = loop(job(*overrides), tmp_path / "parts")
    checkpoint = CheckpointStore(tmp_path / "parts", second.config.checkpointing).latest()
    assert checkpoint is not None
    assert checkpoint.step == 3
    second.resume(checkpoint)
    second.run()
    assert second.policy.skill == whole.policy.skill
    expected = [record for record in whole.recorder.metrics if record["step"] > 3]
    skip = "train/logprob_error"  # a resumed run checks once more
    records = [
        [{k: v for k, v in r.items() if k != skip} for r in part] for part in (second.recorder.metrics, expected)
    ]
    assert without_timings(records[0]) == without_timings(records[1])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["grpo.seed=1"], "unknown key grpo"),
        (["distillation.advantage.baseline=mean"], "unknown key distillation.advantage"),
        (["loss.recipe=dapo"], "loss.recipe=dapo sets keys of grpo, which distillation does not have"),
        (["loss.kl_coef=0.1", "loss.kl_placement=reward"], "puts the KL divergence into rewards, .* only measures"),
        (["distillation.objective=top_k", "loss.aggregation=sequence"], "loss .* has no effect with top_k; remove it"),
        (
            ["distillation.objective=top_k", "policy.backend=megatron"],
            "top_k is not supported by policy.backend=megatron; set distillation.objective=sampled",
        ),
        (["distillation.beta=2"], "distillation.beta: input should be less than or equal to 1"),
        (["teacher.backend=megatron"], "teacher.backend='megatron' is unknown.* Known: torch"),
        (
            ["distillation.max_trajectory_age=1", "loss.importance_correction=none"],
            "distillation.max_trajectory_age=1 trains on completions of older weights",
        ),
        (["cluster.cpu_workers_per_node=3"], "16 samples per optimizer step cannot be split evenly over 3"),
        (["policy.train_global_batch_size=3"], "distillation.num_prompts_per_step x distillation.num_generations"),
    ],
)
def test_invalid_configuration_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(*overrides)


def test_sampled_tokens_work_with_a_megatron_student() -> None:
    assert job("policy.backend=megatron").policy.backend == "megatron"


def test_run_says_how_to_evaluate_its_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(job("distillation.seed=7", "distillation.validation.num_generations=4")))
    config = load_config(EvalConfig, path, convert=from_training)
    assert (config.eval.seed, config.eval.num_generations) == (7, 4)
