"""Reward models train like transformers in float64, and transformers loads their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import RankProcesses
from test_preference_training import LR, MAX_NORM, MODES, POLICY, STEPS, assert_close
from tiny_policy import EPS, PAIRS, make_model, pairs_batch, shard_of
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from nemo_rl.algorithms.preference_losses import BradleyTerryLoss
from nemo_rl.algorithms.reward_model_config import RewardModelConfig
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import ConfigError, ModelError
from nemo_rl.models.policy.config import RewardPolicyConfig
from nemo_rl.models.policy.torch_policy_worker import TorchPolicyWorker

LOSS = RewardModelConfig(centering=0.3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a language model of which reward models are made, with a tokenizer that pads with token 0."""
    from tokenizers import Tokenizer, models

    directory = make_model(tmp_path_factory.mktemp("model"), "qwen2", num_hidden_layers=2)
    words = {str(token): token for token in range(29)}
    core = Tokenizer(models.WordLevel(words, unk_token="1"))
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="0", eos_token="2").save_pretrained(directory)
    return directory


def batch_with_margins(step: int) -> BatchedDataDict:
    batch = pairs_batch(step)
    draws = torch.Generator().manual_seed(step)
    batch["margin"] = torch.rand(PAIRS, generator=draws).repeat_interleave(2)
    return batch


def make_worker(model: Path, **config: Any) -> TorchPolicyWorker:
    policy = RewardPolicyConfig(model_name=str(model), num_threads=1, max_sequence_length=64, **(POLICY | config))
    return TorchPolicyWorker(policy, total_steps=20, seed=3, device_type="cpu", weight_transport="local")


def train_in_float64(model: Path) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Train with transformers; return the steps and the rewards of a batch after them."""
    module = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, pad_token_id=0).double().eval()
    torch.nn.init.zeros_(module.score.weight)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, eps=EPS, weight_decay=0.0)
    steps = []
    for step in range(STEPS):
        batch = batch_with_margins(step)
        optimizer.zero_grad()
        losses = []
        for pair in range(PAIRS):
            if batch["sample_mask"][2 * pair] == 0:
                continue
            chosen, rejected = (
                module(input_ids=batch["input_ids"][row : row + 1, : batch["input_lengths"][row]]).logits[0, 0]
                for row in (2 * pair, 2 * pair + 1)
            )
            margin = batch["margin"][2 * pair].double()
            loss = -(1 / (1 + torch.exp(-(chosen - rejected - margin)))).log()
            losses.append(loss + LOSS.centering * (chosen + rejected) ** 2)
        mean = torch.stack(losses).mean()
        mean.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM))
        optimizer.step()
        steps.append({"loss": mean.item(), "grad_norm": norm})
    with torch.no_grad():
        return steps, module(input_ids=pairs_batch(99)["input_ids"]).logits[:, 0]


def train(
    rank: int, world_size: int, model: Path, config: dict[str, Any], directory: Path | None = None
) -> tuple[list[dict[str, float]], torch.Tensor]:
    worker = make_worker(model, **config)
    steps = []
    for step in range(STEPS):
        shard = shard_of(batch_with_margins(step), rank, world_size, rows_per_group=2, **config)
        metrics = worker.train(shard, BradleyTerryLoss(LOSS)).metrics
        steps.append({name: metrics[name] for name in ("loss", "grad_norm")})
    scores = worker.get_scores(pairs_batch(99))
    if directory is not None:
        worker.save_checkpoint(directory)
    worker.shutdown()
    return steps, scores


def train_as_rank(rank: int, *args: Any) -> tuple[list[dict[str, float]], torch.Tensor]:
    return train(rank, 2, *args)


@pytest.mark.parametrize("mode", MODES)
def test_training_equals_float64(model: Path, mode: str) -> None:
    steps, scores = train(0, 1, model, MODES[mode])
    expected, expected_scores = train_in_float64(model)
    assert_close(steps, expected)
    assert torch.allclose(scores.double(), expected_scores, atol=1e-3)


@pytest.mark.parametrize(("sharding", "mode"), [("ddp", "packed"), ("fsdp", "dynamic")])
def test_two_workers_train_a_model_that_transformers_loads(
    model: Path, two_ranks: RankProcesses, tmp_path: Path, sharding: str, mode: str
) -> None:
    config = MODES[mode] | {"sharding": sharding}
    expected, expected_scores = train_in_float64(model)
    for steps, scores in two_ranks.run(train_as_rank, model, config, tmp_path / "policy"):
        assert_close(steps, expected)
        assert torch.allclose(scores.double(), expected_scores, atol=1e-3)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "policy" / "model")
    assert type(saved).__name__ == "Qwen2ForSequenceClassification"
    assert saved.config.num_labels == 1
    with torch.no_grad():
        loaded = saved(input_ids=pairs_batch(99)["input_ids"]).logits[:, 0]
    assert torch.allclose(loaded, scores, atol=1e-5)

    # Training continues from the checkpoint, and a new run begins with its model.
    worker = make_worker(model)
    worker.load_checkpoint(tmp_path / "policy")
    assert torch.allclose(worker.get_scores(pairs_batch(99)), scores, atol=1e-5)
    worker.shutdown()
    worker = make_worker(tmp_path / "policy" / "model")
    assert torch.allclose(worker.get_scores(pairs_batch(99)), scores, atol=1e-5)
    with pytest.raises(ModelError, match="a reward model computes rewards of conversations and no log-probabilities"):
        worker.get_logprobs(pairs_batch(99))
    worker.shutdown()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"backend": "megatron"}, "policy.backend=megatron does not train reward models; set it to one of: torch"),
        ({"lora": {"rank": 4}}, "policy.lora is not supported for reward models"),
    ],
)
def test_unsupported_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        RewardPolicyConfig(**config)
