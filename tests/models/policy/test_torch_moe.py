"""Qwen3-MoE with the torch worker: transformers stacks the experts of a layer, and a checkpoint has one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_torch_policy_worker import (
    MODES,
    assert_close,
    assert_same_metrics,
    reference_logprobs,
    shards_of,
    train_alone,
)
from tiny_policy import advantage_loss, assert_equal, make_batch, make_moe, make_worker, weights
from transformers import AutoModelForCausalLM

from nemo_rl.errors import ModelError


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("moe"))


@pytest.mark.parametrize("mode", MODES)
def test_moe_logprobs_match_single_sequences(moe: Path, mode: str) -> None:
    worker = make_worker(moe, **MODES[mode])
    [shard] = shards_of(make_batch(), 1, MODES[mode])
    torch.testing.assert_close(worker.get_logprobs(shard), reference_logprobs(moe, shard), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["dynamic", "packed"])
def test_moe_batching_does_not_change_training(moe: Path, mode: str) -> None:
    (expected, expected_state), (actual, state) = train_alone(moe), train_alone(moe, **MODES[mode])
    assert_same_metrics(actual, expected)
    assert_close(state, expected_state)


def test_router_and_experts_learn(moe: Path) -> None:
    before = {name: value for name, value in weights(make_worker(moe)).items() if ".mlp." in name}
    _, after = train_alone(moe, 1)
    assert len([name for name in before if "/" not in name]) == 2 * 3
    assert all(not torch.equal(value, after[name]) for name, value in before.items())


def test_moe_checkpoint_has_the_names_of_published_models(moe: Path, tmp_path: Path) -> None:
    worker = make_worker(moe)
    worker.train(make_batch(), advantage_loss)
    worker.save_checkpoint(tmp_path / "c")
    with safe_open(tmp_path / "c" / "model" / "model.safetensors", "pt") as file:
        names = {name for name in file.keys() if "layers.1.mlp" in name}  # noqa: SIM118 - not a dict
    projections = [f"experts.{expert}.{name}_proj" for expert in range(8) for name in ("gate", "up", "down")]
    assert names == {f"model.layers.1.mlp.{name}.weight" for name in ("gate", *projections)}
    expected = weights(worker)
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "c" / "model")
    loaded = {name: parameter.detach() for name, parameter in module.named_parameters()}
    assert_equal(loaded, {name: value for name, value in expected.items() if "/" not in name})
    resumed = make_worker(moe)
    resumed.load_checkpoint(tmp_path / "c")
    assert_equal(weights(resumed), expected)


def test_adapters_cover_attention_and_not_experts(moe: Path) -> None:
    with pytest.raises(ModelError, match="would include the experts of Qwen3MoeForCausalLM.*name layers, of k_proj, "):
        make_worker(moe, lora={"rank": 4})
    worker = make_worker(moe, lora={"rank": 4, "target_modules": ["q_proj", "o_proj"]})
    worker.train(make_batch(), advantage_loss)
    merged = AutoModelForCausalLM.from_pretrained(moe)
    merged.load_state_dict(dict(worker._state.served_weights()))
    batch = make_batch()
    with torch.no_grad():
        scores = merged(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    expected = scores.gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    actual = worker.get_logprobs(batch)[:, 1:]
    torch.testing.assert_close(actual, expected * (actual != 0), rtol=0, atol=1e-4)
