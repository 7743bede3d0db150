"""Compares the clipped policy-gradient loss with hand-computed values, a slow reference and exact expectations."""

from __future__ import annotations

import itertools
import math
import pickle
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.algorithms.config import LossConfig
from nemo_rl.algorithms.loss_functions import ClippedPGLoss, NLLLoss

Batch = dict[str, torch.Tensor]
# Clipping, dual clip and truncation all take effect on the batches below.
TIGHT = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.25, "dual_clip": 1.5, "importance_cap": 1.2}


def make_batch(rows: int, length: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, Batch]:
    """Make random log-probabilities of a policy, and a batch whose old policies are close to it."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    logprobs = -noise(rows, length).abs() - 0.1
    batch = {
        "token_mask": (torch.rand(rows, length, generator=generator) < 0.7).to(dtype),
        "sample_mask": (torch.rand(rows, generator=generator) < 0.8).to(dtype),
        "advantages": noise(rows),
        "prev_logprobs": logprobs + 0.3 * noise(rows, length),
        "generation_logprobs": logprobs + 0.3 * noise(rows, length),
        "reference_policy_logprobs": logprobs + 0.5 * noise(rows, length),
    }
    batch["token_mask"][0, 1], batch["sample_mask"][0] = 1, 1  # at least one counted token
    return logprobs, batch


def counts(batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return (batch["token_mask"][:, 1:] * batch["sample_mask"][:, None]).sum(), batch["sample_mask"].sum()


def apply(config: LossConfig, logprobs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return ClippedPGLoss(config)(logprobs, batch, *counts(batch))


def slow_reference(config: LossConfig, logprobs: torch.Tensor, batch: Batch) -> dict[str, float]:
    """Compute loss and metrics token by token with the standard library."""
    data = {name: value.tolist() for name, value in batch.items()}
    sums = dict.fromkeys(
        ("ratio_mean", "clip_fraction_low", "clip_fraction_high", "clip_fraction_dual", "approx_kl", "entropy_estimate",
         "importance_weight_mean", "importance_truncated_fraction", "generation_kl"), 0.0
    )  # fmt: skip
    ratios, raw_weights, num_tokens, num_samples = [], [], 0, 0
    per_sample: list[list[tuple[float, float]]] = []
    for i, row in enumerate(logprobs.tolist()):
        if not data["sample_mask"][i]:
            continue
        num_samples += 1
        counted = [t for t in range(1, len(row)) if data["token_mask"][i][t]]
        advantage = data["advantages"][i]
        per_sample.append([])
        sequence_weight = math.prod(
            math.exp(data["prev_logprobs"][i][t]) / math.exp(data["generation_logprobs"][i][t]) for t in counted
        )
        for t in counted:
            num_tokens += 1
            old, gen, ref = (data[f"{name}_logprobs"][i][t] for name in ("prev", "generation", "reference_policy"))
            ratio = math.exp(row[t]) / math.exp(old)
            low, high = 1 - config.clip_ratio_low, 1 + config.clip_ratio_high
            surrogate = min(ratio * advantage, min(max(ratio, low), high) * advantage)
            if config.dual_clip is not None and advantage < 0:
                surrogate = max(surrogate, config.dual_clip * advantage)
                sums["clip_fraction_dual"] += ratio > config.dual_clip
            raw = sequence_weight if config.importance_correction == "sequence" else math.exp(old) / math.exp(gen)
            cap = config.importance_cap or math.inf
            weight = 1.0 if config.importance_correction == "none" else min(raw, cap)
            inverse = math.exp(ref) / math.exp(row[t])  # pi_ref / pi, as in Schulman's note
            kl = {
                "k1": -math.log(inverse),
                "k2": math.log(inverse) ** 2 / 2,
                "k3": inverse - 1 - math.log(inverse),
            }[config.kl_estimator]
            per_sample[-1].append((-weight * surrogate, kl))
            ratios.append(ratio)
            raw_weights.append(raw)
            mismatch = math.exp(old) / math.exp(gen)
            sums["ratio_mean"] += ratio
            sums["clip_fraction_low"] += advantage < 0 and ratio < low
            sums["clip_fraction_high"] += advantage > 0 and ratio > high
            sums["approx_kl"] += ratio - 1 - math.log(ratio)
            sums["entropy_estimate"] -= row[t]
            sums["importance_weight_mean"] += weight
            sums["importance_truncated_fraction"] += raw > cap
            sums["generation_kl"] += mismatch - 1 - math.log(mismatch)
    result = {name: value / num_tokens for name, value in sums.items()}
    for position, name in enumerate(("policy_loss", "kl")):
        if config.aggregation == "token":
            result[name] = sum(token[position] for tokens in per_sample for token in tokens) / num_tokens
        else:
            means = [sum(token[position] for token in tokens) / len(tokens) for tokens in per_sample if tokens]
            result[name] = sum(means) / num_samples
    result["loss"] = result["policy_loss"] + config.kl_coef * result["kl"]
    result |= {"ratio_max": max(ratios), "ratio_min": min(ratios), "importance_weight_max": max(raw_weights)}
    return result


def one_token(ratio: float, advantage: float, **options: Any) -> float:
    """Compute the loss of a single token with this ratio to the previous policy."""
    logprobs = torch.tensor([[0.0, math.log(0.25 * ratio)]], dtype=torch.float64)
    old = torch.tensor([[0.0, math.log(0.25)]], dtype=torch.float64)
    batch = {
        "token_mask": torch.tensor([[0.0, 1.0]]),
        "sample_mask": torch.ones(1),
        "advantages": torch.tensor([advantage]),
        "prev_logprobs": old,
        "generation_logprobs": old,
    }
    return apply(LossConfig(**options), logprobs, batch)[0].item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.0, 2.0, -2.0),  # on policy: -A
        (1.1, 2.0, -2.2),  # inside the clip range: -rA
        (2.0, 2.0, -2.6),  # above 1 + 0.3 with A > 0: clipped
        (0.5, 2.0, -1.0),  # below 1 - 0.2 with A > 0: not clipped
        (2.0, -2.0, 4.0),  # above with A < 0: not clipped
        (0.5, -2.0, 1.6),  # below with A < 0: clipped
        (2.0, 0.0, 0.0),
    ],
)
def test_asymmetric_clip_by_hand(ratio: float, advantage: float, loss: float) -> None:
    assert one_token(ratio, advantage, clip_ratio_low=0.2, clip_ratio_high=0.3) == pytest.approx(loss)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [(10.0, -2.0, 6.0), (2.0, -2.0, 4.0), (0.5, -2.0, 1.6), (10.0, 2.0, -2.4), (1.0, -2.0, 2.0)],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float) -> None:
    assert one_token(ratio, advantage, dual_clip=3.0) == pytest.approx(loss)


def two_samples() -> tuple[torch.Tensor, Batch]:
    """Make one token with advantage 3 and three tokens with advantage -1, on policy."""
    logprobs = torch.full((2, 5), -1.0, dtype=torch.float64)
    return logprobs, {
        "token_mask": torch.tensor([[0.0, 1, 0, 0, 0], [0, 1, 1, 1, 0]]),
        "sample_mask": torch.ones(2),
        "advantages": torch.tensor([3.0, -1.0]),
        "prev_logprobs": logprobs,
        "generation_logprobs": logprobs,
    }


def test_aggregation_by_hand() -> None:
    logprobs, batch = two_samples()
    assert apply(LossConfig(aggregation="token"), logprobs, batch)[0].item() == pytest.approx((-3 + 3 * 1) / 4)
    assert apply(LossConfig(aggregation="sequence"), logprobs, batch)[0].item() == pytest.approx((-3 + 1) / 2)


def test_importance_correction_by_hand() -> None:
    logprobs, batch = two_samples()
    # Under the generator each token is 1.5 times less likely than under the policy.
    batch["generation_logprobs"] = logprobs - math.log(1.5)
    token = apply(LossConfig(importance_correction="token"), logprobs, batch)
    assert token[0].item() == pytest.approx(1.5 * (-3 + 3) / 4)
    assert token[1]["importance_weight_mean"].item() == pytest.approx(1.5)
    # Whole completions: 1.5 for the first, 1.5^3 = 3.375, truncated at 2, for the second.
    sequence = apply(LossConfig(importance_correction="sequence"), logprobs, batch)
    assert sequence[0].item() == pytest.approx((1.5 * -3 + 2 * 3) / 4)
    assert sequence[1]["importance_weight_max"].item() == pytest.approx(3.375)
    assert sequence[1]["importance_truncated_fraction"].item() == pytest.approx(3 / 4)
    untruncated = apply(LossConfig(importance_correction="sequence", importance_cap=None), logprobs, batch)
    assert untruncated[0].item() == pytest.approx((1.5 * -3 + 3.375 * 3) / 4)
    assert apply(LossConfig(importance_correction="none"), logprobs, batch)[0].item() == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", 0.5 - 1 + math.log(2))],
)
def test_kl_by_hand(estimator: Any, expected: float) -> None:
    logprobs, batch = two_samples()
    batch["reference_policy_logprobs"] = logprobs - math.log(2)  # pi = 2 pi_ref
    config = LossConfig(kl_coef=0.1, kl_estimator=estimator)
    loss, metrics = apply(config, logprobs, batch)
    assert metrics["kl"].item() == pytest.approx(expected)
    assert loss.item() == pytest.approx(metrics["policy_loss"].item() + 0.1 * expected)


def exact_kl_gradient(estimator: Any, theta: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Compute the expected gradient of the KL term over all tokens of a small vocabulary."""
    expected = torch.zeros_like(theta)
    for token in range(len(theta)):
        logits = theta.clone().requires_grad_()
        logprob = logits.log_softmax(0)[token]
        row = torch.stack([logprob.new_zeros(()), logprob])[None]
        batch = {
            "token_mask": torch.ones(1, 2),
            "sample_mask": torch.ones(1),
            "advantages": torch.zeros(1),
            "prev_logprobs": row.detach(),
            "reference_policy_logprobs": torch.stack([torch.zeros(()), reference.log_softmax(0)[token]])[None],
        }
        config = LossConfig(kl_coef=1.0, kl_estimator=estimator, importance_correction="none")
        apply(config, row, batch)[0].backward()
        assert logits.grad is not None
        expected += theta.softmax(0)[token] * logits.grad
    return expected


@pytest.mark.parametrize(("estimator", "direction"), [("k1", "reverse"), ("k2", "reverse"), ("k3", "forward")])
def test_expected_gradient_of_each_kl_estimator(estimator: str, direction: str) -> None:
    """k1 and k2 descend KL(pi || ref); k3 descends KL(ref || pi), as the docstring says."""
    theta = torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64)
    reference = torch.tensor([-0.5, 0.4, 0.9, -1.0], dtype=torch.float64)
    logits = theta.clone().requires_grad_()
    policy, ref = logits.log_softmax(0), reference.log_softmax(0)
    reverse, forward = (policy.exp() * (policy - ref)).sum(), (ref.exp() * (ref - policy)).sum()
    (exact,) = torch.autograd.grad(reverse if direction == "reverse" else forward, logits)
    torch.testing.assert_close(exact_kl_gradient(estimator, theta, reference), exact)


def test_gradient_of_the_plain_loss_is_the_policy_gradient() -> None:
    """On policy and without KL term the gradient is -A * grad(log pi) / number of tokens."""
    logprobs, batch = two_samples()
    leaf = logprobs.clone().requires_grad_()
    apply(LossConfig(), leaf, batch)[0].backward()
    advantages = batch["advantages"][:, None].double()
    torch.testing.assert_close(leaf.grad, -advantages * batch["token_mask"].double() / 4)


ALL_VARIANTS = [
    LossConfig(aggregation=a, kl_coef=0.3, kl_estimator=k, importance_correction=i, **TIGHT)  # type: ignore[arg-type]
    for a in ("token", "sequence")
    for k in ("k1", "k2", "k3")
    for i in ("none", "token", "sequence")
]


def variant_name(config: LossConfig) -> str:
    return f"{config.aggregation}-{config.kl_estimator}-{config.importance_correction}"


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ALL_VARIANTS), st.integers(1, 5), st.integers(2, 7), st.integers(0, 10**6))
def test_equals_the_slow_reference(config: LossConfig, rows: int, length: int, seed: int) -> None:
    logprobs, batch = make_batch(rows, length, seed)
    loss, metrics = apply(config, logprobs, batch)
    expected = slow_reference(config, logprobs, batch)
    assert loss.item() == pytest.approx(expected["loss"])
    for name, value in metrics.items():
        assert value.item() == pytest.approx(expected[name], abs=1e-12), name
    assert set(expected) - set(metrics) <= {
        "loss",
        *(n for n in expected if config.importance_correction == "none" and n.startswith(("importance", "generation"))),
    }


@pytest.mark.parametrize("config", [c for c in ALL_VARIANTS if c.kl_estimator != "k1"], ids=variant_name)
def test_gradient_equals_finite_differences(config: LossConfig) -> None:
    logprobs, batch = make_batch(3, 5, seed=7)
    torch.autograd.gradcheck(lambda x: apply(config, x, batch)[0], logprobs.requires_grad_(), eps=1e-7, atol=1e-5)


def test_gradient_of_k1_equals_that_of_k2() -> None:
    """The gradient of k1 is not the derivative of its value, so finite differences do not apply to it."""
    logprobs, batch = make_batch(3, 5, seed=7)
    gradients = []
    for estimator in ("k1", "k2"):
        leaf = logprobs.clone().requires_grad_()
        apply(LossConfig(kl_coef=0.3, kl_estimator=estimator), leaf, batch)[0].backward()  # type: ignore[arg-type]
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_weighted_k3_has_the_gradient_of_k2() -> None:
    """The weight exp(x - x.detach()), x = log pi, has the value 1 and turns the gradient of k3 into that of k2."""
    logprobs, batch = make_batch(3, 5, seed=7)
    leaf = logprobs.clone().requires_grad_()
    apply(LossConfig(kl_coef=0.3, kl_estimator="k2"), leaf, batch)[0].backward()
    weighted = logprobs.clone().requires_grad_()
    d = (weighted - batch["reference_policy_logprobs"])[:, 1:]
    weight = (weighted - weighted.detach()).exp()[:, 1:]
    mask = batch["token_mask"][:, 1:] * batch["sample_mask"][:, None]
    kl = (weight * (torch.expm1(-d) + d) * mask).sum() / mask.sum()
    (apply(LossConfig(), weighted, batch)[0] + 0.3 * kl).backward()
    torch.testing.assert_close(leaf.grad, weighted.grad)


def test_kl_term_contains_no_ratio() -> None:
    logprobs, batch = make_batch(3, 5, seed=7)
    older = {**batch, "prev_logprobs": batch["prev_logprobs"] + 0.5}
    before, after = (apply(LossConfig(kl_coef=0.3), logprobs, data)[1] for data in (batch, older))
    assert before["kl"] == after["kl"]
    assert before["policy_loss"] != after["policy_loss"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALL_VARIANTS), st.integers(2, 8), st.integers(0, 10**6), st.lists(st.integers(1, 7), max_size=4))
def test_micro_batches_add_up(config: LossConfig, rows: int, seed: int, cuts: list[int]) -> None:
    logprobs, batch = make_batch(rows, 6, seed)
    single = logprobs.clone().requires_grad_()
    loss, metrics = apply(config, single, batch)
    loss.backward()
    parts = logprobs.clone().requires_grad_()
    edges = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    total, reduced = 0.0, dict[str, float]()
    for start, end in itertools.pairwise(edges):
        part = {name: value[start:end] for name, value in batch.items()}
        part_loss, part_metrics = ClippedPGLoss(config)(parts[start:end], part, *counts(batch))
        part_loss.backward()
        total += part_loss.item()
        for name, value in part_metrics.items():
            join = max if name.endswith("_max") else min if name.endswith("_min") else (lambda a, b: a + b)
            reduced[name] = join(reduced[name], value.item()) if name in reduced else value.item()
    assert total == pytest.approx(loss.item(), abs=1e-12)
    torch.testing.assert_close(parts.grad, single.grad)
    for name, value in metrics.items():
        assert reduced[name] == pytest.approx(value.item(), abs=1e-12), name


@pytest.mark.parametrize("config", ALL_VARIANTS, ids=variant_name)
def test_masked_positions_have_no_effect(config: LossConfig) -> None:
    """NaN and inf in masked tokens, masked samples and position 0 reach neither loss, metrics nor gradient."""
    logprobs, batch = make_batch(6, 6, seed=3)
    batch["sample_mask"][2] = 0
    clean = logprobs.clone().requires_grad_()
    loss, metrics = apply(config, clean, batch)
    loss.backward()
    off = batch["token_mask"] * batch["sample_mask"][:, None] == 0
    off[:, 0] = True
    poisoned = {name: value.clone() for name, value in batch.items()}
    for name, poison in [("prev", -math.inf), ("generation", math.nan), ("reference_policy", math.inf)]:
        poisoned[f"{name}_logprobs"][off] = poison
    poisoned["advantages"][batch["sample_mask"] == 0] = math.nan
    dirty = logprobs.clone()
    dirty[off] = -math.inf
    dirty.requires_grad_()
    other_loss, other_metrics = apply(config, dirty, poisoned)
    other_loss.backward()
    torch.testing.assert_close(other_loss, loss)
    torch.testing.assert_close(other_metrics, metrics)
    torch.testing.assert_close(dirty.grad, clean.grad)
    assert (clean.grad[off] == 0).all()  # type: ignore[index]


@pytest.mark.parametrize("config", ALL_VARIANTS, ids=variant_name)
def test_fully_masked_batch_is_neutral(config: LossConfig) -> None:
    """A batch with only prompts (T = 1) is neutral as well."""
    logprobs, batch = make_batch(2, 4, seed=1)
    batch["sample_mask"] = torch.zeros(2)
    loss, metrics = apply(config, logprobs.requires_grad_(), batch)
    loss.backward()
    assert loss.item() == 0.0
    assert not logprobs.grad.any()  # type: ignore[union-attr]
    assert metrics.pop("ratio_max").item() == -math.inf
    assert metrics.pop("ratio_min").item() == math.inf
    assert metrics.pop("importance_weight_max", torch.tensor(-math.inf)).item() == -math.inf
    assert all(value.item() == 0.0 for value in metrics.values())
    prompts_only = {name: value[:, :1] if value.ndim > 1 else value for name, value in batch.items()}
    assert apply(config, torch.zeros(2, 1), prompts_only)[0].item() == 0.0


def test_metrics_are_detached_scalars() -> None:
    logprobs, batch = make_batch(4, 6, seed=2)
    _, metrics = apply(LossConfig(kl_coef=0.1), logprobs.requires_grad_(), batch)
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


def test_no_gradient_reaches_the_old_policies() -> None:
    logprobs, batch = make_batch(4, 6, seed=2)
    old = [batch[name].requires_grad_() for name in ("prev_logprobs", "generation_logprobs")]
    apply(LossConfig(), logprobs.requires_grad_(), batch)[0].backward()
    assert [tensor.grad for tensor in old] == [None, None]


def test_kl_is_reported_with_zero_coefficient() -> None:
    logprobs, batch = make_batch(4, 6, seed=2)
    loss, metrics = apply(LossConfig(kl_coef=0.0), logprobs, batch)
    assert metrics["kl"].item() > 0
    assert loss.item() == metrics["policy_loss"].item()


def test_missing_old_logprobs_default_to_the_policy() -> None:
    logprobs, batch = make_batch(3, 6, seed=11)
    logprobs.requires_grad_()
    on_policy = batch | {"prev_logprobs": logprobs.detach()}
    expected, expected_metrics = apply(LossConfig(kl_coef=0.1), logprobs, on_policy)
    (expected_gradient,) = torch.autograd.grad(expected, logprobs)
    batch.pop("prev_logprobs")
    loss, metrics = apply(LossConfig(kl_coef=0.1), logprobs, batch)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient)
    assert metrics == expected_metrics
    assert metrics["ratio_mean"].item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "missing", "needed_by"),
    [
        ({"kl_coef": 0.1}, "reference_policy_logprobs", "loss.kl_coef > 0"),
        ({"importance_correction": "token"}, "generation_logprobs", "loss.importance_correction=token"),
        ({}, "advantages", "the loss"),
    ],
)
def test_missing_key_is_named(options: dict[str, Any], missing: str, needed_by: str) -> None:
    logprobs, batch = make_batch(2, 4, seed=2)
    del batch[missing]
    with pytest.raises(ValueError, match=f"{needed_by} needs '{missing}'"):
        apply(LossConfig(**options), logprobs, batch)


def test_wrong_shape_is_named() -> None:
    logprobs, batch = make_batch(2, 4, seed=2)
    batch["prev_logprobs"] = batch["prev_logprobs"][:, 1:]
    with pytest.raises(ValueError, match=r"'prev_logprobs' has the shape \[2, 3\], expected \[2, 4\]"):
        apply(LossConfig(), logprobs, batch)


def test_pickled_loss_needs_only_torch(tmp_path: Any) -> None:
    """Policy workers in any venv unpickle the loss."""
    loss_fn = ClippedPGLoss(LossConfig(kl_coef=0.1, **TIGHT))  # type: ignore[arg-type]
    logprobs, batch = make_batch(3, 5, seed=5)
    (tmp_path / "case.pkl").write_bytes(pickle.dumps((loss_fn, logprobs, batch, counts(batch))))
    program = (
        "import pickle, sys; sys.modules['pydantic'] = None\n"
        f"loss_fn, *args = pickle.load(open({str(tmp_path / 'case.pkl')!r}, 'rb'))\n"
        "sys.stdout.write(repr(loss_fn(args[0], args[1], *args[2])[0].item()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == loss_fn(logprobs, batch, *counts(batch))[0].item()


EXTREMES = [20.0, 25.0, 90.0, 1e4, math.inf]


def one_extreme_token(key: str, log_ratio: float, advantage: float) -> tuple[torch.Tensor, Batch]:
    """Make two tokens, the second of which differs by `log_ratio` from one of the other policies."""
    logprobs = torch.full((1, 3), -1.0)
    others = ("prev_logprobs", "generation_logprobs", "reference_policy_logprobs")
    batch = {"token_mask": torch.tensor([[0.0, 1.0, 1.0]]), "sample_mask": torch.ones(1)}
    batch |= {name: logprobs.clone() for name in others} | {"advantages": torch.tensor([advantage])}
    batch[key][0, 2] -= log_ratio
    return logprobs.requires_grad_(), batch


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("log_ratio", EXTREMES)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_of_one_token_is_bounded(estimator: str, log_ratio: float, sign: int) -> None:
    logprobs, batch = one_extreme_token("reference_policy_logprobs", sign * log_ratio, 0.0)
    config = LossConfig(kl_coef=0.01, kl_estimator=estimator)  # type: ignore[arg-type]
    loss, metrics = apply(config, logprobs, batch)
    loss.backward()
    assert abs(metrics["kl"].item()) == pytest.approx(10 / 2)  # the mean of two tokens
    assert abs(loss.item()) == pytest.approx(0.01 * 10 / 2)
    assert logprobs.grad is not None
    assert logprobs.grad.abs().max() <= 0.01 * 10 / 2 + 1e-6


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["k1", "k2", "k3"]), st.floats(-2.5, 4.4, allow_subnormal=False))
def test_kl_is_exact_below_the_bound(estimator: str, d: float) -> None:
    logprobs, batch = one_extreme_token("reference_policy_logprobs", d, 0.0)
    d = (logprobs[0, 2] - batch["reference_policy_logprobs"][0, 2]).item()
    _, metrics = apply(LossConfig(kl_coef=1.0, kl_estimator=estimator), logprobs, batch)  # type: ignore[arg-type]
    expected = {"k1": d, "k2": d * d / 2, "k3": math.expm1(-d) + d}[estimator]
    assert metrics["kl"].item() == pytest.approx(expected / 2, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("log_ratio", EXTREMES)
@pytest.mark.parametrize("key", ["prev_logprobs", "generation_logprobs"])
@pytest.mark.parametrize("correction", ["none", "token", "sequence"])
def test_extreme_ratios_stay_finite(key: str, log_ratio: float, sign: int, advantage: float, correction: str) -> None:
    logprobs, batch = one_extreme_token(key, sign * log_ratio, advantage)
    config = LossConfig(importance_correction=correction, importance_cap=None)  # type: ignore[arg-type]
    loss, metrics = apply(config, logprobs, batch)
    loss.backward()
    assert logprobs.grad is not None
    for name, value in {"loss": loss, "gradient": logprobs.grad, **metrics}.items():
        assert value.isfinite().all(), name


def test_truncated_sampling_weights_by_the_support() -> None:
    """Expected gradients over tokens drawn with top-k equal those over the tokens that top-k keeps."""
    logits = torch.tensor([1.5, 0.3, -0.2, -1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 0.4, 0.1, -0.3], dtype=torch.float64).log_softmax(-1)
    rewards = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    kept = [0, 1, 2]
    logprobs = logits.log_softmax(-1)
    sampling = logits.detach()[kept].log_softmax(-1)
    loss_fn = ClippedPGLoss(LossConfig(kl_coef=0.1, kl_estimator="k2"))
    gradient = torch.zeros(4, dtype=torch.float64)
    for position, token in enumerate(kept):
        row = torch.stack([torch.zeros((), dtype=torch.float64), logprobs[token]])[None]
        batch = {
            "token_mask": torch.tensor([[0.0, 1.0]]),
            "sample_mask": torch.ones(1),
            "advantages": rewards[token, None],
            "generation_logprobs": row.detach(),
            "sampling_logprobs": torch.stack([torch.zeros(()).double(), sampling[position]])[None],
            "reference_policy_logprobs": torch.stack([torch.zeros(()).double(), reference[token]])[None],
        }
        loss, _ = loss_fn(row, batch, *counts(batch))
        (of_token,) = torch.autograd.grad(loss, logits, retain_graph=True)
        gradient += sampling[position].exp() * of_token
    probabilities = logprobs.detach().exp()
    d = (logprobs - reference).detach()
    expected = (probabilities * (-rewards + 0.1 * d) * logprobs)[kept].sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_nll_is_the_mean_over_all_tokens_of_the_batch() -> None:
    logprobs, batch = make_batch(6, 9, seed=3)
    logprobs.requires_grad_()
    loss, metrics = NLLLoss()(logprobs, batch, *counts(batch))
    inside = (batch["token_mask"] * batch["sample_mask"][:, None]).bool()
    inside[:, 0] = False
    torch.testing.assert_close(loss, -logprobs[inside].mean(), rtol=1e-12, atol=0)
    assert metrics == {}
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -inside.double() / inside.sum(), rtol=1e-12, atol=0)
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(2), slice(2, 6))]
    halves = [NLLLoss()(logprobs[rows], part, *counts(batch))[0] for rows, part in zip((slice(2), slice(2, 6)), parts)]
    torch.testing.assert_close(sum(halves), loss, rtol=1e-12, atol=0)


def test_nll_ignores_masked_infinities_and_batches_without_tokens() -> None:
    logprobs, batch = make_batch(3, 5, seed=1)
    inside = batch["token_mask"] * batch["sample_mask"][:, None] > 0
    logprobs = torch.where(inside, logprobs, -math.inf).requires_grad_()
    loss, _ = NLLLoss()(logprobs, batch, *counts(batch))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert math.isfinite(loss.item())
    assert bool(gradient.isfinite().all())
    batch["sample_mask"] = torch.zeros(3, dtype=torch.float64)
    assert NLLLoss()(logprobs, batch, *counts(batch))[0].item() == 0.0
