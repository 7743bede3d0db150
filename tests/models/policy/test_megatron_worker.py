"""Megatron workers in the MCORE venv, two ranks on gloo, compared with the torch worker in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import RankProcesses
from tiny_policy import (
    EPS,
    FAMILIES,
    advantage_loss,
    assert_equal,
    make_batch,
    make_model,
    make_worker,
    pairs_batch,
    shard_of,
    weights,
)
from transformers import AutoModelForCausalLM

from nemo_rl.algorithms.config import LossConfig
from nemo_rl.algorithms.dpo_config import DPOConfig
from nemo_rl.algorithms.loss_functions import ClippedPGLoss
from nemo_rl.algorithms.loss_recipes import LOSS_RECIPES, with_recipe
from nemo_rl.algorithms.preference_losses import DPOLoss
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.policy.interfaces import TrainResult

State = dict[str, torch.Tensor]


def slow(*values: Any) -> Any:
    """Parameters that the default run leaves out: variants of others that differ in what they combine."""
    return pytest.param(*values, marks=pytest.mark.slow)


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel_size": 2},
    "tp2_sequence": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "dp2": {},
    "dp2_plain": {"distributed_optimizer": False},
}
MODES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "dynamic": {"batching": {"mode": "dynamic", "max_tokens": 30, "length_multiple": 4}},
    "packed": {"batching": {"mode": "packed", "max_tokens": 30}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    models = {family: make_model(root / family, family) for family in FAMILIES}
    models["tied"] = make_model(root / "tied", "qwen2", tied=True)
    models["windows"] = make_model(
        root / "windows", "qwen3", use_sliding_window=True, sliding_window=3, max_window_layers=1
    )
    models["one_group"] = make_model(root / "one_group", "llama", num_key_value_heads=1)
    return models


def torch_steps(model: Path, steps: int = 3, **config: Any) -> tuple[list[TrainResult], State]:
    worker = make_worker(model, **config)
    results = [worker.train(make_batch(), advantage_loss) for _ in range(steps)]
    return results, weights(worker)


def assert_close(actual: State, expected: State, tolerance: float = 1e-4) -> None:
    """Every tensor differs by at most `tolerance` of its norm."""
    assert actual.keys() == expected.keys()
    errors = {
        name: float((actual[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)) for name in expected
    }
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < tolerance, f"{worst} differs by {errors[worst]:.2g}"


def assert_same_metrics(actual: list[TrainResult], expected: list[TrainResult]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.metrics == pytest.approx(other.metrics, rel=1e-4, abs=1e-6)
        assert (one.num_optimizer_steps, one.num_tokens) == (other.num_optimizer_steps, other.num_tokens)


@pytest.mark.parametrize("layout", [slow("alone"), "tp2", slow("pp2")])
@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_logprobs_match_torch(
    models: dict[str, Path], megatron_ranks: RankProcesses, family: str, layout: str
) -> None:
    config = {"options": LAYOUTS.get(layout, {})}
    results = megatron_ranks.run("tiny_megatron.logprobs", models[family], config, layout == "alone")
    expected = make_worker(models[family]).get_logprobs(make_batch())
    for result in filter(None, results):
        actual, reference_agrees, record = result
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        assert reference_agrees
        assert record["megatron_core"]
    assert expected.abs().max() > 1, "log-probabilities must be large enough to show differences"


@pytest.mark.parametrize("mode", ["dynamic", "packed"])
@pytest.mark.parametrize("layout", ["tp2_sequence", "pp2"])
def test_megatron_logprobs_match_in_every_batching_mode(
    models: dict[str, Path], megatron_ranks: RankProcesses, layout: str, mode: str
) -> None:
    config = {"options": LAYOUTS[layout], **MODES[mode]}
    (actual, _, _), _ = megatron_ranks.run("tiny_megatron.logprobs", models["qwen3"], config)
    expected = make_worker(models["qwen3"], **MODES[mode]).get_logprobs(shard_of(make_batch(), 0, 1, **MODES[mode]))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "mode"),
    [("tp2_sequence", "packed"), slow("pp2", "packed"), ("cp2", "dynamic"), slow("tp2_sequence", "fixed")],
)
def test_windows_and_two_ropes_under_every_split(
    models: dict[str, Path], megatron_ranks: RankProcesses, layout: str, mode: str
) -> None:
    config = {"options": LAYOUTS[layout], "activation_checkpointing": True, **MODES[mode]}
    (actual, state), _ = megatron_ranks.run("tiny_megatron.train", models["gemma3_text"], config)
    expected, expected_state = torch_steps(models["gemma3_text"], **MODES[mode])
    assert_same_metrics(actual, expected)
    assert_close(state, expected_state)


def test_windows_in_some_layers_of_qwen(models: dict[str, Path], megatron_ranks: RankProcesses) -> None:
    (actual, _, _), _ = megatron_ranks.run("tiny_megatron.logprobs", models["windows"], {"options": LAYOUTS["pp2"]})
    expected = make_worker(models["windows"]).get_logprobs(make_batch())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "temperature"),
    [("tp2", 0.5), slow("tp2", 1.5), slow("pp2", 0.5), ("pp2", 1.5), slow("cp2", 0.5), slow("cp2", 1.5)],
)
def test_megatron_temperature_matches_torch(
    models: dict[str, Path], megatron_ranks: RankProcesses, layout: str, temperature: float
) -> None:
    generation = {"temperature": temperature}
    config = {"options": LAYOUTS[layout], "generation": generation}
    (actual, reference_agrees, _), _ = megatron_ranks.run("tiny_megatron.logprobs", models["qwen3"], config)
    expected = make_worker(models["qwen3"], generation=generation).get_logprobs(make_batch())
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)
    assert reference_agrees
    (results, state), _ = megatron_ranks.run("tiny_megatron.train", models["qwen3"], config)
    expected_results, expected_state = torch_steps(models["qwen3"], generation=generation)
    assert_same_metrics(results, expected_results)
    assert_close(state, expected_state)


@pytest.mark.parametrize("layout", ["cp2", slow("tp2_sequence"), "tp2"])
def test_one_key_value_head_with_split_sequences(
    models: dict[str, Path], megatron_ranks: RankProcesses, layout: str
) -> None:
    results = megatron_ranks.run("tiny_megatron.logprobs", models["one_group"], {"options": LAYOUTS[layout]})
    expected = make_worker(models["one_group"]).get_logprobs(make_batch())
    for actual, _, _ in results:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
@pytest.mark.parametrize("family", [family if family == "qwen3" else slow(family) for family in FAMILIES])
def test_ten_steps_match_torch(
    models: dict[str, Path], megatron_ranks: RankProcesses, family: str, layout: str
) -> None:
    results = megatron_ranks.run("tiny_megatron.train", models[family], {"options": LAYOUTS[layout]}, 10)
    metrics, state = torch_steps(models[family], 10)
    for actual, _ in results:
        losses = [result.metrics["loss"] for result in metrics]
        assert [result.metrics["loss"] for result in actual] == pytest.approx(losses, rel=1e-4, abs=1e-6)
    # Moments differ more than weights, because gradients do not average rounding errors out.
    for key, tolerance in (("", 1e-4), ("/exp_avg", 1e-3), ("/exp_avg_sq", 1e-3)):
        chosen = {name for name in state if name.endswith(key) and ("/" in name) == bool(key)}
        assert_close({n: results[0][1][n] for n in chosen}, {n: state[n] for n in chosen}, tolerance)


@pytest.mark.parametrize(
    ("layout", "batching"),
    [("dp2", {"mode": "packed", "max_tokens": 40}), ("pp2", {"mode": "dynamic", "max_tokens": 60})],
)
def test_megatron_trains_on_pairs_like_torch(
    models: dict[str, Path], megatron_ranks: RankProcesses, layout: str, batching: dict[str, Any]
) -> None:
    loss_fn = DPOLoss(DPOConfig())
    config = {"options": LAYOUTS[layout], "batching": batching}
    results = megatron_ranks.run("tiny_megatron.train_on_pairs", models["qwen3"], config, loss_fn)
    worker = make_worker(models["qwen3"])
    expected = [worker.train(pairs_batch(), loss_fn).metrics for _ in range(3)]
    for steps in results:
        for one, other in zip(steps, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("layout", ["tp2_sequence", "cp2", "dp2", "dp2_plain"])
def test_every_layout_trains_like_torch(models: dict[str, Path], megatron_ranks: RankProcesses, layout: str) -> None:
    (actual, state), (again, _) = megatron_ranks.run(
        "tiny_megatron.train", models["qwen3"], {"options": LAYOUTS[layout]}
    )
    expected, expected_state = torch_steps(models["qwen3"])
    assert_same_metrics(actual, expected)
    assert actual == again
    assert_close(state, expected_state)


@pytest.fixture(scope="module")
def noisy_batch(models: dict[str, Path]) -> BatchedDataDict:
    """A batch whose policies differ enough for every bound: clipping, importance weights, KL divergence."""
    batch = make_batch()
    logprobs = make_worker(models["qwen3"]).get_logprobs(batch)
    draws = torch.Generator().manual_seed(1)
    for key, spread in (("prev_logprobs", 0.2), ("generation_logprobs", 0.6), ("reference_policy_logprobs", 0.5)):
        noise = spread * torch.randn(logprobs.shape, generator=draws)
        batch[key] = (logprobs + noise).clamp(max=0.0) * (logprobs != 0)
    batch["advantages"] = batch["advantages"][:, None].expand(logprobs.shape).contiguous()
    return batch


def recipe_losses() -> dict[str, ClippedPGLoss]:
    """Every recipe with an importance correction of its own, and the sequence-level mask."""
    corrections: list[dict[str, Any]] = [
        {"importance_correction": "none"},
        {"importance_correction": "token", "importance_cap": 1.5},
        {
            "importance_correction": "token",
            "importance_cap": 2.0,
            "importance_floor": 0.5,
            "importance_outside": "mask",
        },
        {"importance_correction": "sequence", "importance_cap": 3.0},
    ]
    result = {}
    for number, recipe in enumerate(LOSS_RECIPES):
        keys = with_recipe({"loss": recipe})["loss"] | corrections[number % len(corrections)]
        if recipe == "gspo":  # its own bounds, a thousandth of these, would clip every sample of this batch
            keys |= {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3}
        keys.setdefault("constant_length", 16 if keys.get("aggregation") == "constant" else None)
        result[recipe] = ClippedPGLoss(LossConfig(**keys))
    return result


@pytest.mark.parametrize("layout", ["tp2", slow("pp2"), slow("cp2")])
def test_every_loss_recipe_trains_like_torch(
    models: dict[str, Path], noisy_batch: BatchedDataDict, megatron_ranks: RankProcesses, layout: str
) -> None:
    recipes = recipe_losses()
    config = {"optimizer": {"lr": 1e-3, "weight_decay": 0.1, "eps": EPS}}  # small steps: the policies stay comparable
    arguments = (models["qwen3"], {"options": LAYOUTS[layout], **config}, noisy_batch, list(recipes.values()))
    (results, state), _ = megatron_ranks.run("tiny_megatron.train_with_losses", *arguments)

    worker = make_worker(models["qwen3"], train_micro_batch_size=3, **config)
    for recipe, loss, result in zip(recipes, recipes.values(), results, strict=True):
        expected = worker.train(noisy_batch, loss)
        assert expected.metrics["grad_norm"] > 0, recipe
        assert result.metrics == pytest.approx(expected.metrics, rel=2e-4, abs=2e-6), recipe
    expected_state = weights(worker)
    for name, value in expected_state.items():
        if "/" not in name:
            assert float((state[name] - value).norm() / value.norm()) < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        {"tensor_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_parallel_size": 2, "distributed_optimizer": False},
        {"pipeline_parallel_size": 4},
        {"tensor_parallel_size": 4},
        {"tensor_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2},
    ],
    ids=["tp2_pp2", "tp2_sequence_dp2", "pp2_dp2", "pp4", "tp4", "tp2_sequence_cp2"],
)
def test_four_ranks_train_like_torch(
    models: dict[str, Path], four_ranks: RankProcesses, options: dict[str, Any], mode: str
) -> None:
    if mode == "packed" and "context_parallel_size" in options:
        return
    for name in ("qwen3", "tied"):
        config = {"options": options, **MODES[mode]}
        (actual, state), *others = four_ranks.run("tiny_megatron.train", models[name], config)
        expected, expected_state = torch_steps(models[name])
        assert_same_metrics(actual, expected)
        assert all(metrics == actual for metrics, _ in others)
        assert_close(state, expected_state, 3e-4)


@pytest.mark.parametrize("layout", [slow("tp2"), "pp2", slow("dp2")])
def test_tied_embeddings_and_recomputed_activations(
    models: dict[str, Path], megatron_ranks: RankProcesses, layout: str
) -> None:
    config = {"options": LAYOUTS[layout], "activation_checkpointing": True, **MODES["packed"]}
    (actual, state), _ = megatron_ranks.run("tiny_megatron.train", models["tied"], config)
    expected, expected_state = torch_steps(models["tied"])
    assert "lm_head.weight" not in state
    assert_same_metrics(actual, expected)
    assert_close(state, expected_state)


def test_bfloat16_keeps_float32_master_weights(models: dict[str, Path], megatron_ranks: RankProcesses) -> None:
    for layout in ("dp2", "tp2"):
        config = {"options": LAYOUTS[layout], "precision": "bfloat16"}
        (actual, state), _ = megatron_ranks.run("tiny_megatron.train", models["llama"], config)
        expected, expected_state = torch_steps(models["llama"])
        assert actual[0].metrics["loss"] == pytest.approx(expected[0].metrics["loss"], rel=0.05)
        assert actual[0].metrics["loss"] != expected[0].metrics["loss"]
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in state.values())
        assert state.keys() == expected_state.keys()


@pytest.mark.parametrize("layout", ["tp2", slow("pp2"), slow("dp2")])
@pytest.mark.parametrize("name", ["gemma3_text", "llama", "qwen2", "qwen3", "tied"])
def test_published_megatron_weights_are_exact(
    models: dict[str, Path], megatron_ranks: RankProcesses, name: str, layout: str
) -> None:
    published, nothing = megatron_ranks.run("tiny_megatron.publish", models[name], {"options": LAYOUTS[layout]})
    assert nothing is None
    digest, names, actual = published
    module = AutoModelForCausalLM.from_pretrained(models[name])
    assert_equal(actual, {key: tensor.detach() for key, tensor in module.named_parameters()})
    assert names == [key for key, _ in module.named_parameters()]
    update = make_worker(models[name]).publish_weights(7, "float32")
    assert update is not None
    assert digest == update.digest
    assert megatron_ranks.run("tiny_megatron.served", models[name], {"options": LAYOUTS[layout]}) == [digest] * 2


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_non_finite_loss_changes_nothing(models: dict[str, Path], megatron_ranks: RankProcesses, layout: str) -> None:
    config = {"options": LAYOUTS[layout]}
    assert megatron_ranks.run("tiny_megatron.not_finite_changes_nothing", models["llama"], config) == [True, True]


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ("tp2", "tp2"),
        ("tp2", "pp2"),
        ("dp2", "tp2"),
        pytest.param("pp2", "dp2", marks=pytest.mark.slow),
        pytest.param("dp2_plain", "dp2", marks=pytest.mark.slow),
        pytest.param("cp2", "tp2_sequence", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow  # starts processes for every layout
def test_resume_under_any_layout(
    models: dict[str, Path], megatron_ranks: RankProcesses, tmp_path: Path, saved: str, resumed: str
) -> None:
    train, model, directory = "tiny_megatron.train", models["tied"], tmp_path / "c"
    undisturbed, _ = megatron_ranks.run(
        train, model, {"options": LAYOUTS[saved]}, 3, save=directory, steps_after_save=2
    )
    actual, _ = megatron_ranks.run(train, model, {"options": LAYOUTS[resumed]}, 2, load=directory)
    assert_same_metrics(actual[0], undisturbed[0][3:])
    if saved == resumed:
        assert_equal(actual[1], undisturbed[1])
    assert_close(actual[1], undisturbed[1])


def test_checkpoints_load_across_backends(
    models: dict[str, Path], megatron_ranks: RankProcesses, tmp_path: Path
) -> None:
    worker = make_worker(models["qwen3"])
    worker.train(make_batch(), advantage_loss)
    worker.save_checkpoint(tmp_path / "torch")
    before = weights(worker)
    config = {"options": LAYOUTS["tp2"]}
    (_, loaded), _ = megatron_ranks.run(
        "tiny_megatron.train", models["qwen3"], config, 0, load=tmp_path / "torch", save=tmp_path / "megatron"
    )
    assert_equal(loaded, before)
    back = make_worker(models["qwen3"])
    back.load_checkpoint(tmp_path / "megatron")
    assert_equal(weights(back), before)
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "megatron" / "model")
    assert_equal(
        {name: parameter.detach() for name, parameter in module.named_parameters()},
        {name: tensor for name, tensor in before.items() if "/" not in name},
    )


def test_missing_checkpoint_raises_on_every_rank(
    models: dict[str, Path], megatron_ranks: RankProcesses, tmp_path: Path
) -> None:
    errors = megatron_ranks.run("tiny_megatron.load_fails", models["llama"], tmp_path / "nowhere")
    assert all(error.startswith("CheckpointError: cannot load the checkpoint") for error in errors)


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("llama", {"options": {"tensor_parallel_size": 4}}, "2 workers cannot be divided into groups of 4"),
        ("odd", {"options": {"pipeline_parallel_size": 2}}, "must divide the 3 layers"),
        ("odd", {"options": {"tensor_parallel_size": 2}}, "must divide the 3 attention heads"),
        ("biased", {}, "its projections have biases"),
        ("capped", {}, "its scores or logits are capped (attn_logit_softcapping, final_logit_softcapping)"),
        ("chunked", {}, "it has layers of the type 'chunked_attention'"),
        ("gpt2", {}, "does not support the model family 'gpt2'; supported: gemma3_text, llama, qwen2, qwen3"),
        ("llama", {"max_sequence_length": 65}, "exceeds the 64 positions"),
        ("llama", {"backend": "torch"}, "set policy.backend=megatron"),
    ],
)
def test_unsupported_model_or_layout_is_refused(
    models: dict[str, Path], megatron_ranks: RankProcesses, tmp_path: Path, name: str, config: Any, expected: str
) -> None:
    if name == "odd":
        model = make_model(
            tmp_path, "llama", num_hidden_layers=3, hidden_size=24, num_attention_heads=3, num_key_value_heads=3
        )
    elif name == "biased":
        model = make_model(tmp_path, "llama", attention_bias=True)
    elif name == "capped":
        model = make_model(tmp_path, "gemma3_text", final_logit_softcapping=30.0)
    elif name == "chunked":
        model = make_model(tmp_path, "qwen3", layer_types=["full_attention"] * 3 + ["chunked_attention"])
    elif name == "gpt2":
        from transformers import GPT2Config

        GPT2Config().save_pretrained(tmp_path)
        model = tmp_path
    else:
        model = models[name]
    for error in megatron_ranks.run("tiny_megatron.refused", model, config):
        assert expected in error


@pytest.mark.parametrize(
    ("layout", "config"),
    [
        ("tp2", {}),
        ("pp2", {}),
        ("dp2", {"precision": "bfloat16"}),
        ("dp2", {}),
        ("dp2_plain", {"precision": "bfloat16"}),
    ],
    ids=str,
)
@pytest.mark.slow  # starts processes for every layout
def test_megatron_offload_is_bit_exact(
    models: dict[str, Path], megatron_ranks: RankProcesses, layout: str, config: dict[str, Any]
) -> None:
    how = {"options": LAYOUTS[layout], **config}
    offloaded = megatron_ranks.run("tiny_megatron.train_with_offload", models["tied"], how, offloads=True)
    plain = megatron_ranks.run("tiny_megatron.train_with_offload", models["tied"], how, offloads=False)
    for (actual, state), (expected, expected_state) in zip(offloaded, plain):
        assert actual == expected
        assert_equal(state, expected_state)


def test_shutdown_frees_the_model(models: dict[str, Path], megatron_ranks: RankProcesses) -> None:
    assert all(megatron_ranks.run("tiny_megatron.is_freed_after_shutdown", models["llama"], {"options": {}}))


@pytest.mark.parametrize("layout", ["pp2", "dp2"])
def test_megatron_checkpoint_while_offloaded(
    models: dict[str, Path], megatron_ranks: RankProcesses, tmp_path: Path, layout: str
) -> None:
    config = {"options": LAYOUTS[layout], "precision": "bfloat16"}
    assert all(megatron_ranks.run("tiny_megatron.checkpoint_while_offloaded", models["llama"], config, tmp_path))
