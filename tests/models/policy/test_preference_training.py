"""Preference losses train like transformers in float64, in every mode and on every number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import RankProcesses
from tiny_policy import EPS, PAIRS, make_worker, pairs_batch, shard_of
from transformers import AutoModelForCausalLM

from nemo_rl.algorithms.dpo_config import DPOConfig
from nemo_rl.algorithms.preference_losses import DPOLoss

WIDTH, STEPS = 14, 4
LR, MAX_NORM = 1e-2, 0.5
POLICY: dict[str, Any] = {
    "optimizer": {"lr": LR, "weight_decay": 0.0, "eps": EPS},
    "scheduler": {"kind": "constant"},
    "max_grad_norm": MAX_NORM,
}
MODES: dict[str, dict[str, Any]] = {
    "fixed": {"train_micro_batch_size": 4},
    "dynamic": {"batching": {"mode": "dynamic", "max_tokens": 2 * WIDTH + 10}},
    "packed": {"batching": {"mode": "packed", "max_tokens": 2 * WIDTH + 10}},
}


def train_in_float64(model: Path, config: DPOConfig) -> list[dict[str, float]]:
    """Train with transformers and the equations of DPO and IPO, one conversation at a time."""
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, eps=EPS, weight_decay=0.0)
    steps = []
    for step in range(STEPS):
        batch = pairs_batch(step)
        optimizer.zero_grad()
        losses = []
        for pair in range(PAIRS):
            if batch["sample_mask"][2 * pair] == 0:
                continue
            ratios = []
            for row in (2 * pair, 2 * pair + 1):
                ids = batch["input_ids"][row, : batch["input_lengths"][row]]
                logprobs = module(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
                chosen = logprobs.gather(1, ids[1:, None])[:, 0][batch["token_mask"][row, 1 : len(ids)] > 0]
                ratio = chosen.sum() - batch["reference_logprobs"][row]
                ratios.append(ratio / len(chosen) if config.loss == "ipo" else ratio)
            h = ratios[0] - ratios[1]
            losses.append(
                (h - 1 / (2 * config.beta)) ** 2
                if config.loss == "ipo"
                else torch.nn.functional.softplus(-config.beta * h)
            )
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM))
        optimizer.step()
        steps.append({"loss": float(loss.detach()), "grad_norm": norm})
    return steps


def train(rank: int, world_size: int, model: Path, config: dict[str, Any], loss: DPOConfig) -> list[dict[str, float]]:
    worker = make_worker(model, **(POLICY | config))
    steps = []
    for step in range(STEPS):
        shard = shard_of(pairs_batch(step), rank, world_size, rows_per_group=2, **config)
        metrics = worker.train(shard, DPOLoss(loss)).metrics
        steps.append({name: metrics[name] for name in ("loss", "grad_norm")})
    worker.shutdown()
    return steps


def train_as_rank(rank: int, *args: Any) -> list[dict[str, float]]:
    return train(rank, 2, *args)


def assert_close(steps: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [s["loss"] for s in steps] == pytest.approx([s["loss"] for s in expected], rel=1e-4)
    assert [s["grad_norm"] for s in steps] == pytest.approx([s["grad_norm"] for s in expected], rel=1e-3)


@pytest.mark.parametrize("loss", [DPOConfig(), DPOConfig(loss="ipo", beta=0.5)], ids=["sigmoid", "ipo"])
@pytest.mark.parametrize("mode", MODES)
def test_training_equals_float64(llama: Path, mode: str, loss: DPOConfig) -> None:
    assert_close(train(0, 1, llama, MODES[mode], loss), train_in_float64(llama, loss))


@pytest.mark.parametrize(
    ("sharding", "mode"), [("ddp", "fixed"), ("ddp", "packed"), ("fsdp", "dynamic"), ("fsdp", "packed")]
)
def test_two_workers_equal_float64(llama: Path, two_ranks: RankProcesses, sharding: str, mode: str) -> None:
    config = MODES[mode] | {"sharding": sharding}
    for steps in two_ranks.run(train_as_rank, llama, config, DPOConfig()):
        assert_close(steps, train_in_float64(llama, DPOConfig()))
