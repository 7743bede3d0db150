"""Qwen3-MoE with Megatron-Core on several ranks, compared with transformers and the torch worker in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import RankProcesses
from tiny_policy import (
    advantage_loss,
    assert_equal,
    make_batch,
    make_llama,
    make_moe,
    make_worker,
    weights,
    with_experts,
)
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow  # starts processes of groups

TP2 = {"tensor_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "ep2": {"expert_parallel_size": 2},
    "ep2_plain": {"expert_parallel_size": 2, "distributed_optimizer": False},
    "tp2_ep2": {**TP2, "expert_parallel_size": 2},
    "tp2_plain": {**TP2, "distributed_optimizer": False},
    "cp2_ep2": {"context_parallel_size": 2, "expert_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
}
PACKED = {"batching": {"mode": "packed", "max_tokens": 30}}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("moe"))


def assert_trains_like_torch(model: Path, results: list[Any]) -> None:
    """Assert that metrics (gradient norm included), weights and moments equal those of one torch worker."""
    (metrics, state), worker = results[0], make_worker(model)
    assert all(others == metrics for others, _ in results[1:])
    for actual in metrics:
        expected = worker.train(make_batch(), advantage_loss)
        assert actual.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-6)
        assert actual.num_tokens == expected.num_tokens
    for name, value in weights(worker).items():
        error = float((state[name] - value).norm() / value.norm().clamp(min=1e-6))
        assert error < (1e-3 if "/" in name else 1e-4), f"{name} differs by {error:.2g}"


@pytest.mark.parametrize("layout", ["alone", "ep2"])
@pytest.mark.parametrize("config", [{}, {"norm_topk_prob": False}], ids=str)
def test_moe_logprobs_match_transformers(
    four_ranks: RankProcesses, tmp_path: Path, layout: str, config: dict[str, Any]
) -> None:
    model = make_moe(tmp_path, **config)
    batch = make_batch()
    with torch.no_grad():
        scores = AutoModelForCausalLM.from_pretrained(model)(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    chosen = scores.gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    inside = torch.arange(1, batch["input_ids"].shape[1]) < batch["input_lengths"][:, None]
    expected = torch.nn.functional.pad(chosen * inside, (1, 0))
    assert expected.abs().max() > 1
    options = {"options": LAYOUTS.get(layout, {})}
    num_ranks = 1 if layout == "alone" else 2
    results = four_ranks.run("tiny_megatron.logprobs", model, options, num_ranks=num_ranks)
    actual = torch.cat([result[0] for result in results])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert all(reference_agrees for _, reference_agrees, _ in results)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moe_layout_trains_like_torch(moe: Path, four_ranks: RankProcesses, layout: str) -> None:
    results = four_ranks.run("tiny_megatron.train", moe, {"options": LAYOUTS[layout]}, num_ranks=2)
    assert_trains_like_torch(moe, results)


@pytest.mark.parametrize(
    "config",
    [PACKED, {"batching": {"mode": "dynamic", "max_tokens": 30}}, {"activation_checkpointing": True}],
    ids=["packed", "dynamic", "recomputed"],
)
def test_moe_batches_train_like_torch(moe: Path, four_ranks: RankProcesses, config: dict[str, Any]) -> None:
    results = four_ranks.run("tiny_megatron.train", moe, {"options": LAYOUTS["ep2"], **config}, num_ranks=2)
    assert_trains_like_torch(moe, results)


@pytest.mark.parametrize(
    "options",
    [
        {**TP2, "expert_parallel_size": 2},
        {"pipeline_parallel_size": 2, "expert_parallel_size": 2},
        {"context_parallel_size": 2, "expert_parallel_size": 4},
    ],
    ids=["tp2_ep2_dp2", "pp2_ep2", "cp2_ep4"],
)
def test_four_moe_ranks_train_like_torch(moe: Path, four_ranks: RankProcesses, options: dict[str, Any]) -> None:
    assert_trains_like_torch(moe, four_ranks.run("tiny_megatron.train", moe, {"options": options}))


@pytest.mark.parametrize("layout", ["ep2", "tp2_ep2", "cp2_ep2", "pp2"])
def test_megatron_replays_experts_like_torch(moe: Path, four_ranks: RankProcesses, layout: str) -> None:
    batch, losses = with_experts(make_batch()), [advantage_loss] * 2
    results = four_ranks.run(
        "tiny_megatron.train_with_losses", moe, {"options": LAYOUTS[layout]}, batch, losses, num_ranks=2
    )
    worker, own = make_worker(moe), make_worker(moe)
    for index, loss in enumerate(losses):
        expected = worker.train(batch, loss).metrics
        assert all(actual[index].metrics == pytest.approx(expected, rel=1e-4, abs=1e-6) for actual, _ in results)
        assert own.train(make_batch(), loss).metrics != pytest.approx(expected, rel=1e-2)
    for name, value in weights(worker).items():
        error = float((results[0][1][name] - value).norm() / value.norm().clamp(min=1e-6))
        assert error < 1e-3, f"{name} differs by {error:.2g}"


def test_bfloat16_experts_keep_float32_master_weights(moe: Path, four_ranks: RankProcesses) -> None:
    config = {"options": LAYOUTS["ep2"], "precision": "bfloat16"}
    (actual, state), _ = four_ranks.run("tiny_megatron.train", moe, config, 1, num_ranks=2)
    expected = make_worker(moe).train(make_batch(), advantage_loss)
    assert actual[0].metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=0.05)
    experts = state["model.layers.0.mlp.experts.down_proj"]
    assert experts.dtype == torch.float32
    assert not torch.equal(experts, experts.bfloat16().float())


@pytest.mark.parametrize("layout", ["ep2", "tp2_ep2"])
def test_published_experts_are_exact(moe: Path, four_ranks: RankProcesses, layout: str) -> None:
    config = {"options": LAYOUTS[layout]}
    (digest, names, actual), nothing = four_ranks.run("tiny_megatron.publish", moe, config, num_ranks=2)
    assert nothing is None
    module = AutoModelForCausalLM.from_pretrained(moe)
    assert_equal(actual, {name: parameter.detach() for name, parameter in module.named_parameters()})
    assert names == [name for name, _ in module.named_parameters()]
    update = make_worker(moe).publish_weights(7, "float32")
    assert update is not None
    assert digest == update.digest
    assert four_ranks.run("tiny_megatron.served", moe, config, num_ranks=2) == [digest] * 2


@pytest.mark.parametrize(("saved", "resumed"), [("ep2", "ep2"), ("ep2", "tp2_plain")])
def test_moe_resumes_under_any_layout(
    moe: Path, four_ranks: RankProcesses, tmp_path: Path, saved: str, resumed: str
) -> None:
    train, directory = "tiny_megatron.train", tmp_path / "c"
    undisturbed, _ = four_ranks.run(
        train, moe, {"options": LAYOUTS[saved]}, 2, save=directory, steps_after_save=2, num_ranks=2
    )
    continued, _ = four_ranks.run(train, moe, {"options": LAYOUTS[resumed]}, 2, load=directory, num_ranks=2)
    for actual, expected in zip(continued[0], undisturbed[0][2:], strict=True):
        assert actual.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-6)
    if saved == resumed:
        assert_equal(continued[1], undisturbed[1])


def test_moe_checkpoint_continues_on_the_torch_backend(moe: Path, four_ranks: RankProcesses, tmp_path: Path) -> None:
    (_, state), _ = four_ranks.run(
        "tiny_megatron.train", moe, {"options": LAYOUTS["ep2"]}, 1, save=tmp_path / "c", num_ranks=2
    )
    worker = make_worker(moe)
    worker.load_checkpoint(tmp_path / "c")
    assert_equal(weights(worker), state)


def test_moe_offload_is_bit_exact(moe: Path, four_ranks: RankProcesses) -> None:
    scenario, config = "tiny_megatron.train_with_offload", {"options": LAYOUTS["ep2"]}
    offloaded = four_ranks.run(scenario, moe, config, offloads=True, num_ranks=2)
    for (actual, state), (expected, expected_state) in zip(
        offloaded, four_ranks.run(scenario, moe, config, offloads=False, num_ranks=2), strict=True
    ):
        assert actual == expected
        assert_equal(state, expected_state)


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ({}, {"tensor_parallel_size": 2}, "needs policy.options.sequence_parallel=true for"),
        ({}, {"expert_parallel_size": 4}, "does not divide the 2 workers of a pipeline stage"),
        ({"num_experts": 7}, {"expert_parallel_size": 2}, "must divide the 7 experts of"),
        (None, {"expert_parallel_size": 2}, "has no experts: set policy.options.expert_parallel_size=2 to 1"),
        ({"decoder_sparse_step": 2}, {}, "some of its layers have no experts"),
        ({"mlp_only_layers": [0]}, {}, "some of its layers have no experts"),
    ],
)
def test_unsupported_experts_are_refused(
    four_ranks: RankProcesses, tmp_path: Path, model: dict[str, Any] | None, options: Any, expected: str
) -> None:
    directory = make_llama(tmp_path) if model is None else make_moe(tmp_path, **model)
    for error in four_ranks.run("tiny_megatron.refused", directory, {"options": options}, num_ranks=2):
        assert expected in error


def test_experts_are_divided_over_ranks(moe: Path, four_ranks: RankProcesses) -> None:
    counts = four_ranks.run("tiny_megatron.num_expert_weights", moe, {"options": LAYOUTS["ep2"]}, num_ranks=2)
    assert counts == [2 * 8 * 3 * 24 * 32 // 2] * 2
