"""One torch worker, and two that train together: results do not depend on micro-batches and shards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import RankProcesses
from tiny_policy import (
    EPS,
    advantage_loss,
    assert_equal,
    make_batch,
    make_model,
    make_moe,
    make_worker,
    nan_loss,
    weights,
)
from transformers import AutoModelForCausalLM

from nemo_rl.algorithms.config import LossConfig
from nemo_rl.algorithms.loss_functions import ClippedPGLoss
from nemo_rl.distributed.batched_data_dict import BatchedDataDict, SlicedDataDict
from nemo_rl.errors import DataError, ModelError, NonFiniteError
from nemo_rl.models.policy.config import BatchingConfig
from nemo_rl.models.policy.interfaces import TrainResult
from nemo_rl.models.policy.microbatching import sharding_args

MODES: dict[str, dict[str, Any]] = {
    "fixed": {"train_micro_batch_size": 3, "logprob_batch_size": 5},
    "dynamic": {"batching": {"mode": "dynamic", "max_tokens": 30, "length_multiple": 4}},
    "packed": {"batching": {"mode": "packed", "max_tokens": 30}},
}


def shards_of(
    batch: BatchedDataDict, world_size: int, config: dict[str, Any], batch_size: int | None = None
) -> list[SlicedDataDict]:
    result = batch.shard_by_batch_size(
        world_size, batch_size, **sharding_args(BatchingConfig(**config.get("batching", {})))
    )
    return result[0] if isinstance(result, tuple) else result


def train_alone(
    model: Path, steps: int = 3, batch: BatchedDataDict | None = None, **config: Any
) -> tuple[list[TrainResult], dict[str, torch.Tensor]]:
    worker = make_worker(model, **config)
    batch = make_batch() if batch is None else batch
    results = [worker.train(shards_of(batch, 1, config)[0], advantage_loss) for _ in range(steps)]
    state = weights(worker)
    worker.shutdown()
    return results, state


def train_as_rank(rank: int, model: Path, config: dict[str, Any]) -> tuple[list[TrainResult], dict[str, torch.Tensor]]:
    worker = make_worker(model, **config)
    shard = shards_of(make_batch(), 2, config)[rank]
    results = [worker.train(shard, advantage_loss) for _ in range(3)]
    state = weights(worker)
    worker.shutdown()
    return results, state


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


def assert_same_metrics(first: list[TrainResult], second: list[TrainResult]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.metrics == pytest.approx(other.metrics, rel=1e-4, abs=1e-6)
        assert (one.num_optimizer_steps, one.num_tokens) == (other.num_optimizer_steps, other.num_tokens)


def reference_logprobs(model: Path, batch: BatchedDataDict, temperature: float = 1.0) -> torch.Tensor:
    """Compute log-probabilities one sequence at a time with transformers alone."""
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    result = torch.zeros(batch["input_ids"].shape)
    for row, length in enumerate(batch["input_lengths"].tolist()):
        ids = batch["input_ids"][row, :length]
        with torch.no_grad():
            logprobs = torch.log_softmax(module(input_ids=ids[None]).logits[0] / temperature, dim=-1)
        result[row, 1:length] = logprobs[:-1].gather(-1, ids[1:, None])[:, 0]
    return result


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logprobs_match_single_sequences(llama: Path, mode: str, attention: str) -> None:
    config = MODES[mode]
    worker = make_worker(llama, attn_implementation=attention, **config)
    batch = make_batch()
    shard = shards_of(batch, 1, config)[0]
    logprobs = worker.get_logprobs(shard)
    torch.testing.assert_close(logprobs, reference_logprobs(llama, shard), rtol=1e-4, atol=1e-5)
    assert logprobs.dtype == torch.float32
    assert logprobs.shape == batch["input_ids"].shape


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with windows that are shorter than the samples, and buffers that no checkpoint contains."""
    return make_model(tmp_path_factory.mktemp("gemma"), "gemma3_text")


@pytest.mark.parametrize("mode", MODES)
def test_logprobs_of_layers_with_windows(gemma: Path, mode: str) -> None:
    shard = shards_of(make_batch(), 1, MODES[mode])[0]
    logprobs = make_worker(gemma, **MODES[mode]).get_logprobs(shard)
    torch.testing.assert_close(logprobs, reference_logprobs(gemma, shard), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_logprobs_have_the_temperature_of_generation(llama: Path, mode: str, temperature: float) -> None:
    config = MODES[mode] | {"generation": {"temperature": temperature}}
    worker = make_worker(llama, **config)
    shard = shards_of(make_batch(), 1, config)[0]
    expected = reference_logprobs(llama, shard, temperature)
    torch.testing.assert_close(worker.get_logprobs(shard), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(worker.get_reference_policy_logprobs(shard), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_sampled_tokens_train_the_distribution_they_came_from(llama: Path, mode: str, temperature: float) -> None:
    """Draw from softmax(logits / T) with transformers, and compare loss and gradient with autograd through it."""
    batch = make_batch()
    module = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attention_dropout=0.0)
    logprobs = torch.log_softmax(module(input_ids=batch["input_ids"]).logits[:, :-1] / temperature, dim=-1)
    logprobs = torch.nn.functional.pad(logprobs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0], (1, 0))
    batch["generation_logprobs"] = logprobs.detach() - 0.1  # the generator differs: every weight is e^0.1
    batch["reference_policy_logprobs"] = logprobs.detach() + 0.3
    counted = batch["token_mask"][:, 1:] * batch["sample_mask"][:, None]
    surrogate = math.exp(0.1) * (logprobs - logprobs.detach()).exp()[:, 1:] * batch["advantages"][:, None]
    d = (logprobs - batch["reference_policy_logprobs"])[:, 1:]
    loss = ((-surrogate + 0.2 * (torch.exp(-d) - 1 + d)) * counted).sum() / counted.sum()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
    config = MODES[mode] | {"generation": {"temperature": temperature}}
    worker = make_worker(llama, **config)
    loss_fn = ClippedPGLoss(LossConfig(kl_coef=0.2))
    metrics = worker.train(shards_of(batch, 1, config)[0], loss_fn).metrics
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    assert metrics["importance_weight_mean"] == pytest.approx(math.exp(0.1), rel=1e-4)
    assert metrics["ratio_max"] == pytest.approx(1.0)


def test_first_step_matches_adamw_by_hand(llama: Path) -> None:
    """Compare with one pass of transformers over the batch, torch's clipping and the published AdamW update."""
    batch = make_batch()
    module = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attention_dropout=0.0)
    logprobs = torch.log_softmax(module(input_ids=batch["input_ids"]).logits[:, :-1], dim=-1)
    logprobs = torch.nn.functional.pad(logprobs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0], (1, 0))
    counted = batch["token_mask"][:, 1:] * batch["sample_mask"][:, None]
    loss, _ = advantage_loss(logprobs, batch, counted.sum(), batch["sample_mask"].sum())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
    (result,), state = train_alone(llama, steps=1)
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert result.metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert result.metrics["lr"] == pytest.approx(1e-2 * 1 / 2)  # first of two warm-up steps
    assert norm > 0.5, "the step must clip"
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        decay = 0.1 if parameter.ndim > 1 else 0.0
        # After one step the bias-corrected moments equal the gradient and its square.
        expected = parameter * (1 - 0.005 * decay) - 0.005 * gradient / (gradient.abs() + EPS)
        torch.testing.assert_close(state[name], expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_training_does_not_depend_on_micro_batches(llama: Path, mode: str) -> None:
    expected = train_alone(llama, train_micro_batch_size=8)
    results = train_alone(llama, **MODES[mode])
    assert_same_metrics(expected[0], results[0])
    assert_close(expected[1], results[1])


def test_training_is_deterministic(llama: Path) -> None:
    assert_equal(train_alone(llama)[1], train_alone(llama)[1])


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize("mode", MODES)
def test_two_workers_train_like_one(llama: Path, two_ranks: RankProcesses, sharding: str, mode: str) -> None:
    config = {"sharding": sharding, **MODES[mode]}
    first, second = two_ranks.run(train_as_rank, llama, config)
    assert_equal(first[1], second[1])
    assert first[0] == second[0]
    alone = train_alone(llama)
    assert_same_metrics(first[0], alone[0])
    assert_close(first[1], alone[1])


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_workers_train_experts_like_one(two_ranks: RankProcesses, tmp_path: Path, sharding: str) -> None:
    model, config = make_moe(tmp_path), {"sharding": sharding, **MODES["packed"]}
    (results, state), _ = two_ranks.run(train_as_rank, model, config)
    expected, expected_state = train_alone(model)
    assert_same_metrics(results, expected)
    assert_close(state, expected_state)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_workers_are_deterministic(llama: Path, two_ranks: RankProcesses, sharding: str) -> None:
    runs = [two_ranks.run(train_as_rank, llama, {"sharding": sharding}) for _ in range(2)]
    assert_equal(runs[0][0][1], runs[1][0][1])
    assert runs[0][0][0] == runs[1][0][0]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_tied_embeddings_and_activation_checkpointing(
    tied_llama: Path, two_ranks: RankProcesses, sharding: str
) -> None:
    config = {"sharding": sharding, "activation_checkpointing": True}
    (results, state), _ = two_ranks.run(train_as_rank, tied_llama, config)
    alone = train_alone(tied_llama)
    assert "lm_head.weight" not in state
    assert_same_metrics(results, alone[0])
    assert_close(state, alone[1])


def test_sharded_gemma_trains_like_one_worker(gemma: Path, two_ranks: RankProcesses) -> None:
    config = {"sharding": "fsdp", "activation_checkpointing": True, **MODES["packed"]}
    (results, state), _ = two_ranks.run(train_as_rank, gemma, config)
    alone = train_alone(gemma)
    assert_same_metrics(results, alone[0])
    assert_close(state, alone[1])


def test_several_optimizer_steps_per_call(llama: Path) -> None:
    batch = make_batch()
    worker = make_worker(llama)
    halves = [worker.train(batch.slice(start, start + 4), advantage_loss) for start in (0, 4)]
    both = make_worker(llama)
    result = both.train(batch, advantage_loss, local_batch_size=4)
    assert_equal(weights(worker), weights(both))
    assert result.num_optimizer_steps == 2
    assert result.num_tokens == int(batch["input_lengths"].sum())
    for name, value in result.metrics.items():
        assert value == pytest.approx(sum(half.metrics[name] for half in halves) / 2)
    with pytest.raises(DataError, match=r"8 samples.*of 3"):
        both.train(batch, advantage_loss, local_batch_size=3)


def test_non_finite_loss_does_not_change_training(llama: Path) -> None:
    worker = make_worker(llama)
    worker.train(make_batch(), advantage_loss)
    before = weights(worker)
    with pytest.raises(NonFiniteError, match=r"optimizer step 2: loss nan"):
        worker.train(make_batch(), nan_loss)
    assert_equal(before, weights(worker))
    worker.train(make_batch(), advantage_loss)
    undisturbed = make_worker(llama)
    for _ in range(2):
        undisturbed.train(make_batch(), advantage_loss)
    assert_equal(weights(undisturbed), weights(worker))


def fail_on_one_rank(rank: int, model: Path, config: dict[str, Any]) -> bool:
    worker = make_worker(model, **config)
    before = weights(worker)
    try:
        worker.train(make_batch(4, seed=rank), nan_loss if rank == 1 else advantage_loss)
    except NonFiniteError:
        assert_equal(before, weights(worker))
        return True
    return False


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_non_finite_loss_on_one_rank_raises_on_all(llama: Path, two_ranks: RankProcesses, sharding: str) -> None:
    assert two_ranks.run(fail_on_one_rank, llama, {"sharding": sharding}) == [True, True]


def test_reference_keeps_the_initial_weights(llama: Path) -> None:
    worker = make_worker(llama)
    batch = make_batch()
    start = worker.get_logprobs(batch)
    for _ in range(3):
        worker.train(batch, advantage_loss)
    assert torch.equal(worker.get_reference_policy_logprobs(batch), start)
    assert (worker.get_logprobs(batch) - start).abs().max() > 0.01


def test_bfloat16_keeps_float32_weights(llama: Path) -> None:
    worker = make_worker(llama, precision="bfloat16")
    batch = make_batch()
    exact = reference_logprobs(llama, batch)
    error = (worker.get_logprobs(batch) - exact).abs().max()
    assert 1e-4 < error < 0.3
    result = worker.train(batch, advantage_loss)
    alone = train_alone(llama, steps=1)[0][0]
    assert result.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=0.05)
    assert {tensor.dtype for tensor in weights(worker).values()} == {torch.float32}


def train_in_bfloat16(rank: int, model: Path) -> tuple[float, set[torch.dtype]]:
    worker = make_worker(model, precision="bfloat16", sharding="fsdp")
    result = worker.train(make_batch().chunk(rank, 2), advantage_loss)
    return result.metrics["loss"], {tensor.dtype for tensor in weights(worker).values()}


def test_bfloat16_with_fsdp(llama: Path, two_ranks: RankProcesses) -> None:
    alone = train_alone(llama, steps=1)[0][0]
    for loss, dtypes in two_ranks.run(train_in_bfloat16, llama):
        assert loss == pytest.approx(alone.metrics["loss"], rel=0.05)
        assert loss != alone.metrics["loss"]
        assert dtypes == {torch.float32}


def publish_as_rank(rank: int, model: Path, sharding: str) -> Any:
    worker = make_worker(model, sharding=sharding)
    return worker.publish_weights(7, "float32")


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_published_weights_do_not_depend_on_sharding(llama: Path, two_ranks: RankProcesses, sharding: str) -> None:
    alone = make_worker(llama).publish_weights(7, "float32")
    update, nothing = two_ranks.run(publish_as_rank, llama, sharding)
    assert nothing is None
    assert update.digest == alone.digest
    names = [spec.name for bucket in update.buckets for spec in bucket.tensors]
    assert names == [name for name, _ in AutoModelForCausalLM.from_pretrained(llama).named_parameters()]


def test_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model directory '.*nowhere'.*policy\.model_name"):
        make_worker(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        make_worker(tmp_path / "empty")


def test_damaged_model_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"cannot be loaded"):
        make_worker(tmp_path)


def test_too_long_sequences_are_refused(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"max_sequence_length=65 exceeds the 64 positions"):
        make_worker(llama, max_sequence_length=65)


def test_attestation_has_software_and_model(llama: Path) -> None:
    record = make_worker(llama).attestation()
    assert record["torch"] == torch.__version__
    assert record["model"] == "LlamaForCausalLM"
    assert record["num_parameters"] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(llama).parameters())
