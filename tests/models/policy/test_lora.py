"""Adapters: equal to peft in value and gradient, merged for generation, resumed bit for bit, loaded by peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rank_processes import RankProcesses
from test_policy_checkpoint import resumed, undisturbed
from tiny_policy import advantage_loss, assert_equal, make_batch, make_llama, make_model, make_worker, weights
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import CheckpointError, ConfigError, ModelError
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.weights.receiver import receive
from nemo_rl.utils.config import load_config

LORA: dict[str, Any] = {"rank": 4, "alpha": 12, "target_modules": ["q_proj", "down_proj"], "seed": 5}


def reference(model: Path, seed: int = 5) -> Any:
    """Return peft's own model with the adapters of `LORA`."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attention_dropout=0.0)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
    return peft.get_peft_model(base, config)


def adapters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name.removeprefix("base_model.model."): p for name, p in module.named_parameters() if p.requires_grad}


def randomize(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Leave the start, at which B and the gradients of A are 0."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(parameters):
            parameters[name].copy_(0.3 * torch.randn(parameters[name].shape, generator=draws))


def logprobs_of(module: Any, batch: BatchedDataDict) -> torch.Tensor:
    """Compute log-probabilities one sequence at a time, with gradient."""
    rows = []
    width = batch["input_ids"].shape[1]
    for ids, length in zip(batch["input_ids"], batch["input_lengths"].tolist(), strict=True):
        logprobs = module(input_ids=ids[None, :length]).logits[0].log_softmax(-1)
        chosen = logprobs[:-1].gather(-1, ids[1:length, None])[:, 0]
        rows.append(torch.nn.functional.pad(chosen, (1, width - length)))
    return torch.stack(rows)


def test_adapters_begin_without_effect(llama: Path) -> None:
    batch = make_batch()
    adapted, plain = make_worker(llama, lora=LORA), make_worker(llama)
    # Not bit for bit: projections with adapters are separate products.
    torch.testing.assert_close(adapted.get_logprobs(batch), plain.get_logprobs(batch), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapted.get_reference_policy_logprobs(batch), plain.get_logprobs(batch))


@pytest.mark.parametrize(
    "mode", [{}, {"batching": {"mode": "packed", "max_tokens": 30}, "activation_checkpointing": True}]
)
def test_value_and_gradient_equal_those_of_peft(llama: Path, mode: dict[str, Any]) -> None:
    batch = make_batch()
    worker = make_worker(
        llama, lora=LORA, optimizer={"lr": 1e-3, "eps": 1e-2}, scheduler={}, max_grad_norm=None, **mode
    )
    expected = reference(llama)
    mine, theirs = adapters(worker._model.module), adapters(expected)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), "peft begins with other values"
    randomize(mine)
    randomize(theirs)
    torch.testing.assert_close(worker.get_logprobs(batch), logprobs_of(expected, batch).detach(), rtol=1e-4, atol=1e-5)

    mask = batch["token_mask"][:, 1:] * batch["sample_mask"][:, None]
    loss, _ = advantage_loss(logprobs_of(expected, batch), batch, mask.sum(), batch["sample_mask"].sum())
    loss.backward()
    optimizer = torch.optim.AdamW(theirs.values(), lr=1e-3, eps=1e-2, weight_decay=0.0)
    optimizer.step()
    result = worker.train(batch, advantage_loss)
    assert result.metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_generation_gets_merged_weights(llama: Path) -> None:
    batch = make_batch()
    worker = make_worker(llama, lora=LORA)
    for _ in range(2):
        worker.train(batch, advantage_loss)
    served = {name: tensor.clone() for name, tensor in receive(worker.publish_weights(1, "float32"))}
    plain = make_worker(llama)
    assert list(served) == [name for name, _ in plain._state.served_weights()]
    expected = reference(llama)
    with torch.no_grad():
        for name, value in adapters(worker._model.module).items():
            adapters(expected)[name].copy_(value)
    merged = expected.merge_and_unload().state_dict()
    before = dict(plain._state.served_weights())
    for name, tensor in served.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
        is_adapted = name.endswith(("q_proj.weight", "down_proj.weight"))
        assert torch.equal(tensor, before[name]) != is_adapted, name


def test_layers_with_transposed_weights(tmp_path: Path) -> None:
    """GPT-2's layers hold the transpose of a linear layer's weight."""
    config = GPT2Config(vocab_size=29, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0, embd_pdrop=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    worker = make_worker(tmp_path / "gpt2", lora={"rank": 2, "target_modules": ["c_attn", "c_proj"]})
    randomize(adapters(worker._model.module))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2", dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in worker._state.served_weights():
            merged.get_parameter(name).copy_(tensor)
    batch = make_batch()
    torch.testing.assert_close(worker.get_logprobs(batch), logprobs_of(merged, batch).detach(), rtol=1e-4, atol=1e-5)


def test_all_linear_layers(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", "qwen2", tied=True)
    worker = make_worker(model, lora={"rank": 2})
    names = {name.partition(".lora_")[0].rpartition(".")[2] for name in adapters(worker._model.module)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def train_as_rank(rank: int, model: Path, sharding: str) -> dict[str, torch.Tensor]:
    worker = make_worker(model, lora=LORA, sharding=sharding)
    shard = make_batch().chunk(rank, 2)
    for _ in range(3):
        worker.train(shard, advantage_loss)
    return {name: tensor.clone() for name, tensor in worker._state.weights()}


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_workers_train_as_one(llama: Path, two_ranks: RankProcesses, sharding: str) -> None:
    alone = make_worker(llama, lora=LORA)
    for _ in range(3):
        alone.train(make_batch(), advantage_loss)
    expected = dict(alone._state.weights())
    for found in two_ranks.run(train_as_rank, llama, sharding):
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_one_worker_resumes_bit_for_bit(llama: Path, tmp_path: Path) -> None:
    config = {"lora": LORA}
    expected, actual = (run(0, 1, llama, tmp_path / "c", config)[0] for run in (undisturbed, resumed))
    assert_equal(expected, actual)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_workers_resume_bit_for_bit(llama: Path, tmp_path: Path, two_ranks: RankProcesses, sharding: str) -> None:
    arguments = (2, llama, tmp_path / "c", {"sharding": sharding, "lora": LORA})
    first, second = two_ranks.run(undisturbed, *arguments), two_ranks.run(resumed, *arguments)
    for (expected, _), (actual, _) in zip(first, second, strict=True):
        assert_equal(expected, actual)


def test_checkpoint_is_loaded_by_transformers_and_peft(llama: Path, tmp_path: Path) -> None:
    worker, batch = make_worker(llama, lora=LORA), make_batch()
    worker.train(batch, advantage_loss)
    worker.save_checkpoint(tmp_path / "c")
    expected = worker.get_logprobs(batch)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "c" / "model", dtype=torch.float32)
    torch.testing.assert_close(logprobs_of(merged, batch).detach(), expected, rtol=1e-4, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "c" / "adapter")).eval()
    torch.testing.assert_close(logprobs_of(adapted, batch).detach(), expected, rtol=1e-4, atol=1e-5)
    assert adapted.peft_config["default"].base_model_name_or_path == str(llama)


def test_checkpoints_that_do_not_fit(llama: Path, tmp_path: Path) -> None:
    worker = make_worker(llama, lora=LORA)
    worker.train(make_batch(), advantage_loss)
    worker.save_checkpoint(tmp_path / "adapted")
    other = make_worker(make_llama(tmp_path / "other", seed=9), lora=LORA)
    before = weights(other)
    with pytest.raises(CheckpointError, match="adapters belong to another model than policy.model_name=.*embed_tokens"):
        other.load_checkpoint(tmp_path / "adapted")
    assert_equal(before, weights(other))
    full = make_worker(llama)
    with pytest.raises(CheckpointError, match="it lacks"):
        full.load_checkpoint(tmp_path / "adapted")
    full.save_checkpoint(tmp_path / "full")
    with pytest.raises(CheckpointError, match="it lacks"):
        make_worker(llama, lora=LORA).load_checkpoint(tmp_path / "full")


def test_adapter_of_a_tied_output_layer_is_refused(tied_llama: Path) -> None:
    """Its weight is the embedding's, so the change of the one would change the other."""
    with pytest.raises(ModelError, match="lm_head of LlamaForCausalLM shares its weight .* remove 'lm_head'"):
        make_worker(tied_llama, lora={"target_modules": ["q_proj", "lm_head"]})


def test_wrong_settings_are_one_sentence(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"has no linear layer 'qproj'\. Did you mean 'q_proj'\? It has: down_proj, "):
        make_worker(llama, lora={"target_modules": ["qproj"]})
    with pytest.raises(ConfigError, match="policy.lora is not supported by policy.backend=megatron"):
        load_config(PolicyConfig, overrides=["lora.rank=4", "backend=megatron"])
    with pytest.raises(ConfigError, match="name at least one linear layer"):
        load_config(PolicyConfig, overrides=["lora.target_modules=[]"])
