"""Supervised training against transformers and AdamW in float64, one sequence at a time and without packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import RankProcesses
from tiny_policy import EPS, make_batch, make_worker, shard_of
from transformers import AutoModelForCausalLM

from nemo_rl.algorithms.loss_functions import NLLLoss
from nemo_rl.distributed.batched_data_dict import BatchedDataDict

STEPS, LR, DECAY, MAX_NORM = 8, 1e-2, 0.1, 0.5
POLICY: dict[str, Any] = {
    "optimizer": {"lr": LR, "weight_decay": DECAY, "eps": EPS},
    "scheduler": {"kind": "constant"},
    "max_grad_norm": MAX_NORM,
    "train_micro_batch_size": 3,
}
MODES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "dynamic": {"batching": {"mode": "dynamic", "max_tokens": 30}},
    "packed": {"batching": {"mode": "packed", "max_tokens": 30}},
}


def turns_batch(seed: int) -> BatchedDataDict:
    """Return samples with several turns in the loss: pieces of the sequence, and single tokens."""
    batch = make_batch(seed=seed)
    draws = torch.Generator().manual_seed(seed)
    inside = batch["token_mask"] > 0
    batch["token_mask"] = (inside & (torch.rand(inside.shape, generator=draws) < 0.6)).float()
    batch.pop("advantages")
    return batch


def train_in_float64(model: Path) -> list[dict[str, float]]:
    """Return loss and gradient norm of each step, by transformers' cross entropy over all tokens of the batch."""
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, eps=EPS)
    steps = []
    for step in range(STEPS):
        batch = turns_batch(step)
        labels = torch.where(batch["token_mask"] > 0, batch["input_ids"], -100)
        labels[batch["sample_mask"] == 0] = -100
        count = int((labels[:, 1:] != -100).sum())
        optimizer.zero_grad()
        total = 0.0
        for row, length in enumerate(batch["input_lengths"].tolist()):
            logits = module(input_ids=batch["input_ids"][row : row + 1, :length]).logits[0, :-1]
            targets = labels[row, 1:length]
            loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count
            loss.backward()
            total += loss.item()
        norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM))
        optimizer.step()
        steps.append({"loss": total, "grad_norm": norm})
    return steps


def train(rank: int, world_size: int, model: Path, config: dict[str, Any]) -> list[dict[str, float]]:
    worker = make_worker(model, **(POLICY | config))
    steps = []
    for step in range(STEPS):
        shard = shard_of(turns_batch(step), rank, world_size, **config)
        metrics = worker.train(shard, NLLLoss()).metrics
        steps.append({name: metrics[name] for name in ("loss", "grad_norm")})
    worker.shutdown()
    return steps


def train_as_rank(rank: int, model: Path, config: dict[str, Any]) -> list[dict[str, float]]:
    return train(rank, 2, model, config)


def assert_close(steps: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [s["loss"] for s in steps] == pytest.approx([s["loss"] for s in expected], abs=1e-4)
    assert [s["grad_norm"] for s in steps] == pytest.approx([s["grad_norm"] for s in expected], rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_training_equals_float64(llama: Path, mode: str) -> None:
    assert_close(train(0, 1, llama, MODES[mode]), train_in_float64(llama))


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize("mode", ["fixed", "packed"])
def test_two_workers_equal_float64(llama: Path, two_ranks: RankProcesses, sharding: str, mode: str) -> None:
    config = MODES[mode] | {"sharding": sharding}
    for steps in two_ranks.run(train_as_rank, llama, config):
        assert_close(steps, train_in_float64(llama))
