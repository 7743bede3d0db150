"""Distillation of workers against transformers and AdamW in float64, one sequence at a time and without packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import RankProcesses
from tiny_policy import EPS, VOCABULARY, make_batch, make_model, make_worker, shard_of
from transformers import AutoModelForCausalLM

from nemo_rl.algorithms.config import LossConfig
from nemo_rl.algorithms.distillation_losses import SampledTokensLoss, TopTokensLoss
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.teacher.torch_teacher_worker import TorchTeacherWorker

STEPS, LR, DECAY, MAX_NORM, TEMPERATURE, K, BETA = 3, 1e-2, 0.1, 0.5, 0.7, 4, 0.3
POLICY: dict[str, Any] = {
    "optimizer": {"lr": LR, "weight_decay": DECAY, "eps": EPS},
    "scheduler": {"kind": "constant"},
    "max_grad_norm": MAX_NORM,
    "train_micro_batch_size": 3,
    "logprob_batch_size": 3,
    "generation": {"temperature": TEMPERATURE},
}
MODES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "dynamic": {"batching": {"mode": "dynamic", "max_tokens": 30}},
    "packed": {"batching": {"mode": "packed", "max_tokens": 30}},
}
OBJECTIVES = ("sampled", "top_k")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of another family whose vocabulary is padded: its last three tokens are never sampled."""
    return make_model(tmp_path_factory.mktemp("teacher"), "qwen2", seed=5, vocab_size=VOCABULARY + 3)


def batch_of(step: int) -> BatchedDataDict:
    batch = make_batch(seed=step)
    batch.pop("advantages")
    return batch


def score(worker: TorchTeacherWorker, shard: BatchedDataDict, objective: str) -> None:
    if objective == "sampled":
        shard["teacher_logprobs"] = worker.get_logprobs(shard)
    else:
        shard["top_ids"], shard["teacher_top_logprobs"] = worker.get_top_logprobs(shard, K, VOCABULARY)


def loss_of(objective: str) -> Any:
    return (
        SampledTokensLoss(LossConfig(importance_correction="none")) if objective == "sampled" else TopTokensLoss(BETA)
    )


def score_batches(rank: int, num_ranks: int, teacher: Path, objective: str, **config: Any) -> list[BatchedDataDict]:
    """Return this rank's shards of all batches with what the teacher adds to them."""
    options = {**POLICY, **config, "model_name": str(teacher), "max_sequence_length": 64, "num_threads": 1}
    worker = TorchTeacherWorker(PolicyConfig(**options), device_type="cpu")
    shards = [shard_of(batch_of(step), rank, num_ranks, **config) for step in range(STEPS)]
    for shard in shards:
        score(worker, shard, objective)
    worker.shutdown()
    return shards


def train(student: Path, shards: list[BatchedDataDict], objective: str, **config: Any) -> list[Any]:
    worker = make_worker(student, **(POLICY | config))
    steps = [worker.train(shard, loss_of(objective)).metrics for shard in shards]
    worker.shutdown()
    return steps


def score_as_rank(rank: int, *args: Any, **config: Any) -> list[BatchedDataDict]:
    return score_batches(rank, 2, *args, **config)


def train_as_rank(
    rank: int, student: Path, shards: list[list[BatchedDataDict]], *args: Any, **config: Any
) -> list[Any]:
    return train(student, shards[rank], *args, **config)


def train_in_float64(student: Path, teacher: Path, objective: str) -> list[dict[str, float]]:
    module, frozen = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval() for path in (student, teacher)
    )
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, eps=EPS)
    steps = []
    for step in range(STEPS):
        batch = batch_of(step)
        count = (batch["token_mask"] * batch["sample_mask"][:, None])[:, 1:].sum()
        optimizer.zero_grad()
        total = 0.0
        for row, length in enumerate(batch["input_lengths"].tolist()):
            ids = batch["input_ids"][row : row + 1, :length]
            mask = batch["token_mask"][row, 1:length] * batch["sample_mask"][row]
            q = (module(input_ids=ids).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
            with torch.no_grad():
                p = (frozen(input_ids=ids).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
            if objective == "sampled":
                mine, theirs = (values.gather(-1, ids[0, 1:, None])[:, 0] for values in (q, p))
                terms = -(theirs - mine.detach()) * (mine - mine.detach()).exp()
            else:
                top = p[:, :VOCABULARY].topk(K).indices
                q, p = (with_rest(values.exp(), top) for values in (q, p))
                m = BETA * p + (1 - BETA) * q
                terms = (BETA * p * (p / m).log() + (1 - BETA) * q * (q / m).log()).sum(-1)
            loss = (terms * mask).sum() / count
            loss.backward()
            total += loss.item()
        norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM))
        optimizer.step()
        steps.append({"loss": total, "grad_norm": norm})
    return steps


def with_rest(probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    chosen = probabilities.gather(-1, ids)
    return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1)


@pytest.fixture(scope="module")
def expected(llama: Path, teacher: Path) -> dict[str, list[dict[str, float]]]:
    return {objective: train_in_float64(llama, teacher, objective) for objective in OBJECTIVES}


def assert_close(steps: list[Any], expected: list[dict[str, float]]) -> None:
    assert [s["loss"] for s in steps] == pytest.approx([s["loss"] for s in expected], rel=1e-4, abs=1e-4)
    assert [s["grad_norm"] for s in steps] == pytest.approx([s["grad_norm"] for s in expected], rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_equals_float64(llama: Path, teacher: Path, expected: Any, objective: str, mode: str) -> None:
    shards = score_batches(0, 1, teacher, objective, **MODES[mode])
    assert_close(train(llama, shards, objective, **MODES[mode]), expected[objective])


@pytest.mark.parametrize(("mode", "sharding"), [("fixed", "ddp"), ("packed", "fsdp")])
def test_two_workers_equal_float64(
    llama: Path, teacher: Path, two_ranks: RankProcesses, expected: Any, sharding: str, mode: str
) -> None:
    for objective in OBJECTIVES:
        config = MODES[mode] | {"sharding": sharding}
        shards = two_ranks.run(score_as_rank, teacher, objective, **config)
        for steps in two_ranks.run(train_as_rank, llama, shards, objective, **config):
            assert_close(steps, expected[objective])


def test_teacher_offers_only_tokens_that_the_student_knows(teacher: Path) -> None:
    config = PolicyConfig(model_name=str(teacher), max_sequence_length=64, num_threads=1)
    worker = TorchTeacherWorker(config, device_type="cpu")
    shard = batch_of(0)
    ids, logprobs = worker.get_top_logprobs(shard, VOCABULARY, VOCABULARY)
    inside = shard["token_mask"] > 0
    assert set(ids[inside].flatten().tolist()) == set(range(VOCABULARY))
    torch.testing.assert_close(logprobs[inside].exp().sum(-1), torch.ones(int(inside.sum())))
    assert logprobs[inside][:, -1].exp().min() > 0  # the padding tokens
    worker.offload()
    again = worker.get_top_logprobs(shard, VOCABULARY, VOCABULARY)
    assert torch.equal(again[1], logprobs)
    assert worker.attestation()["model"] == "Qwen2ForCausalLM"
