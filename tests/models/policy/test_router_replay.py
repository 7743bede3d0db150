"""Router replay: training takes the experts that generation chose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_torch_policy_worker import MODES, shards_of
from tiny_policy import advantage_loss, make_batch, make_moe, make_worker, weights, with_experts
from transformers import AutoModelForCausalLM, LlamaConfig

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.algorithms.rollouts import training_batch
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import ConfigError, ModelError
from nemo_rl.models.embedded import make_tokenizer
from nemo_rl.models.generation.config import GenerationConfig, GeneratorSpec
from nemo_rl.models.generation.interfaces import GenerationRequest, GenerationResult
from nemo_rl.models.generation.results import join, select
from nemo_rl.models.generation.torch.generator import TorchGenerator
from nemo_rl.models.weights.sender import publish
from nemo_rl.utils.config import load_config

LAYERS, TOP_K = 2, 2


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("moe"))


def reference_logprobs(model: Path, batch: BatchedDataDict) -> torch.Tensor:
    """Compute log-probabilities one sequence at a time, with routers that are written here."""
    module = AutoModelForCausalLM.from_pretrained(model)
    result = torch.zeros(batch["input_ids"].shape)
    for row, length in enumerate(batch["input_lengths"].tolist()):
        experts = batch["routed_experts"][row, :length].view(length, LAYERS, TOP_K).long()
        for layer, block in enumerate(module.model.layers):
            block.mlp.gate.forward = _router(block.mlp.gate, experts[:, layer])
        with torch.no_grad():
            scores = module(batch["input_ids"][row : row + 1, :length]).logits[0].log_softmax(-1)
        result[row, 1:length] = scores[:-1].gather(-1, batch["input_ids"][row, 1:length, None])[:, 0]
    return result


def _router(gate: Any, experts: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    def forward(hidden: torch.Tensor) -> Any:
        logits = hidden.reshape(-1, hidden.shape[-1]) @ gate.weight.T
        chosen = logits.gather(1, experts).exp()  # softmax over the chosen experts
        return logits, chosen / chosen.sum(-1, keepdim=True), experts

    return forward


@pytest.mark.parametrize("mode", MODES)
def test_replayed_logprobs_match_reference(moe: Path, mode: str) -> None:
    worker, batch = make_worker(moe, **MODES[mode]), with_experts(make_batch())
    [shard] = shards_of(batch, 1, MODES[mode])
    actual = worker.get_logprobs(shard)
    torch.testing.assert_close(actual, reference_logprobs(moe, shard), rtol=1e-4, atol=1e-5)
    assert torch.equal(worker.get_reference_policy_logprobs(shard), actual), "a KL divergence begins at 0"
    del shard["routed_experts"]
    own = worker.get_logprobs(shard)
    assert (own - actual).abs().max() > 0.1
    assert torch.equal(worker.get_reference_policy_logprobs(shard), own)


@pytest.mark.parametrize("config", [MODES["packed"], {"activation_checkpointing": True}], ids=["packed", "recomputed"])
def test_replay_trains_alike_in_every_mode(moe: Path, config: dict[str, Any]) -> None:
    states = []
    for options in ({}, config):
        worker = make_worker(moe, **options)
        [shard] = shards_of(with_experts(make_batch()), 1, options)
        states.append(([worker.train(shard, advantage_loss).metrics for _ in range(2)], weights(worker)))
    (expected, expected_state), (actual, state) = states
    assert actual == [pytest.approx(metrics, rel=1e-4, abs=1e-6) for metrics in expected]
    for name, value in expected_state.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def generate(model: Path, precision: str, num_prompts: int, max_new_tokens: int = 24) -> GenerationResult:
    """Generate with the torch engine, a few sequences at a time."""
    config = GenerationConfig(
        precision=precision, router_replay=True, max_new_tokens=max_new_tokens, max_batch_size=48, stop_strings=["7"]
    )
    generator = TorchGenerator(GeneratorSpec(str(model), config, 64))
    module = AutoModelForCausalLM.from_pretrained(model)
    generator.update_weights(publish(module.named_parameters(), version=1, dtype=precision, transport="local"))
    lengths = torch.arange(num_prompts) % 5 + 2
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (num_prompts, 6), generator=draws) * (torch.arange(6) < lengths[:, None])
    return generator.generate(GenerationRequest(ids, lengths, seed=1, num_generations=4))


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, many experts, and logits near ties."""
    directory, tokenizer = tmp_path_factory.mktemp("talking"), make_tokenizer()
    make_moe(
        directory, vocab_size=len(tokenizer), num_experts=32, num_experts_per_tok=4, hidden_size=64, num_hidden_layers=4
    )
    tokenizer.save_pretrained(directory)
    return directory


def test_engine_returns_the_experts_of_every_token(talking: Path) -> None:
    batch = training_batch(generate(talking, "float32", 20))
    module = AutoModelForCausalLM.from_pretrained(talking)
    chosen: list[torch.Tensor] = []
    for block in module.model.layers:
        block.mlp.gate.register_forward_hook(lambda _, inputs, output: chosen.append(output[2]))
    lengths = batch["input_lengths"].tolist()
    assert len(set(lengths)) > 5
    for ids, experts, length in zip(batch["input_ids"], batch["routed_experts"], lengths, strict=True):
        chosen.clear()
        with torch.no_grad():
            module(ids[None, : length - 1])
        expected = torch.stack(chosen, dim=1)
        actual = experts[: length - 1].view_as(expected)
        assert torch.equal(actual.long().sort(-1).values, expected.sort(-1).values)
        assert not experts[length - 1 :].any()


def test_joined_results_keep_their_experts(talking: Path) -> None:
    short, long = generate(talking, "float32", 3, max_new_tokens=3), generate(talking, "float32", 3)
    both = join([short, select(long, [5, 2])])
    assert both.routed_experts is not None
    assert short.routed_experts is not None
    assert long.routed_experts is not None
    width = short.routed_experts.shape[1]
    assert torch.equal(both.routed_experts[:12, :width], short.routed_experts)
    assert not both.routed_experts[:12, width:].any()
    assert torch.equal(both.routed_experts[12:], long.routed_experts[[5, 2]])


def test_replay_shrinks_the_gap_between_generation_and_training(talking: Path) -> None:
    """Completions in bfloat16, log-probabilities in float32: without replay, tokens near ties have other experts."""
    batch = training_batch(generate(talking, "bfloat16", 64))
    gaps = {}
    for replay in (True, False):
        if not replay:
            del batch["routed_experts"]
        logprobs = make_worker(talking).get_logprobs(batch)
        difference = (logprobs - batch["generation_logprobs"]).abs()[batch["token_mask"] > 0]
        gaps[replay] = float(difference.mean()), float(difference.quantile(0.99)), float(difference.max())
    print(f"mean, 99th percentile, maximum: {gaps[False]} without replay, {gaps[True]} with replay")
    assert gaps[True][0] < 0.5 * gaps[False][0]


def test_dense_model_is_refused() -> None:
    spec = GeneratorSpec("some/model", GenerationConfig(router_replay=True), 64)
    with pytest.raises(ModelError, match="supports qwen3_moe, and 'some/model' is of the family llama"):
        spec.config.options.check_model(LlamaConfig(), spec)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["policy.generation.backend=vllm"], "router_replay=true is not supported by policy.generation.backend=vllm"),
        (
            [
                "policy.backend=megatron",
                "policy.activation_checkpointing=true",
                "policy.options.pipeline_parallel_size=2",
                "cluster.cpu_workers_per_node=2",
            ],
            "does not support policy.activation_checkpointing with",
        ),
        (["env.guess.class=guess_number"], "does not support environments with turns"),
    ],
)
def test_unsupported_replay_is_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(MasterConfig, None, ["policy.generation.router_replay=true", *overrides])
