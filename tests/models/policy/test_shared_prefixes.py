"""Tests that sharing prefixes changes the layout of a micro-batch, but neither log-probabilities nor gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_policy import VOCABULARY, advantage_loss, make_model, make_moe, make_worker, with_experts

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.policy import cpu_kernels, logprob_forward, sequence_layouts
from nemo_rl.models.policy.sequence_layouts import SharedRow, share_prefixes
from nemo_rl.models.policy.torch_policy_worker import TorchPolicyWorker


def rows_of(prompts: list[int], continuations: list[list[int]], width: int = 12) -> BatchedDataDict:
    """Return a batch: for each prompt its length, and the lengths of its continuations; 0 leaves nothing to score."""
    draws = torch.Generator().manual_seed(0)
    ids, lengths, starts = [], [], []
    for prompt_length, group in zip(prompts, continuations, strict=True):
        prompt = torch.randint(1, VOCABULARY, (prompt_length,), generator=draws)
        for length in group:
            row = torch.cat([prompt, torch.randint(1, VOCABULARY, (length,), generator=draws)])
            ids.append(torch.nn.functional.pad(row, (0, width - len(row))))
            lengths.append(len(row))
            starts.append(prompt_length)
    position = torch.arange(width)
    total, start = torch.tensor(lengths), torch.tensor(starts)
    return BatchedDataDict(
        input_ids=torch.stack(ids),
        input_lengths=total,
        token_mask=((position >= start[:, None]) & (position < total[:, None])).float(),
        sample_mask=torch.ones(len(ids)),
        advantages=torch.randn(len(ids), generator=draws),
    )


def scored(batch: BatchedDataDict) -> torch.Tensor:
    return batch["token_mask"] > 0


def contexts(row: SharedRow) -> list[list[int]]:
    """Return the tokens that each scored logit can see, derived from the layout alone."""
    layout, ids = row.layout, row.input_ids[0].tolist()
    count = len(layout.prefixes.position)
    seen: list[list[int]] = []
    prefixes: dict[int, list[int]] = {}
    for index in range(count):
        own = prefixes.setdefault(int(layout.prefixes.sequence[index]), [])
        own.append(ids[index])
        seen.append(list(own))
    if layout.continuations is not None:
        own_tokens: dict[int, list[int]] = {}
        for index, (sequence, position) in enumerate(
            zip(layout.continuations.sequence.tolist(), layout.continuations.position.tolist(), strict=True)
        ):
            own = own_tokens.setdefault(sequence, [])
            own.append(ids[count + index])
            prefix = prefixes[int(layout.prefix[sequence])]
            mask = layout.mask[sequence if len(layout.mask) > 1 else 0, 0, position]
            assert int(mask[: layout.prefixes.longest].sum()) == len(prefix)
            assert int(mask[layout.prefixes.longest :].sum()) == len(own) == position + 1
            seen.append(prefix + own)
    return [seen[index] for index in row.logits.tolist()]


@settings(deadline=None, max_examples=60)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 5), st.lists(st.integers(0, 7), min_size=1, max_size=4)), min_size=1, max_size=4
    )
)
def test_every_scored_token_sees_exactly_its_own_past(groups: list[tuple[int, list[int]]]) -> None:
    batch = rows_of([prompt for prompt, _ in groups], [lengths for _, lengths in groups])
    row = share_prefixes(batch["input_ids"], scored(batch))
    if row is None:
        return
    rows, columns = scored(batch).nonzero(as_tuple=True)
    assert (row.rows.tolist(), row.positions.tolist()) == (rows.tolist(), columns.tolist())
    for context, index, column in zip(contexts(row), rows.tolist(), columns.tolist(), strict=True):
        assert context == batch["input_ids"][index, :column].tolist()
    positions = row.position_ids[0][row.logits]
    assert positions.tolist() == (columns - 1).tolist()


@pytest.mark.parametrize(
    ("prompts", "continuations", "is_shared"),
    [
        ([5, 5], [[4, 4, 4], [4, 4, 4]], True),
        ([5, 3], [[4, 1, 7], [2, 6, 3]], True),
        ([6], [[0, 3, 3]], True),
        ([6, 6], [[1, 1, 1], [1, 1, 1]], True),
        ([5, 5, 5], [[4], [4], [4]], False),
        ([1], [[7, 7]], False),
        ([4, 4], [[0, 0], [0, 5]], False),
    ],
    ids=["equal", "uneven", "nothing to score", "one token", "no common prompt", "short prompt", "one row to score"],
)
def test_prefixes_are_shared_where_that_saves_tokens(
    prompts: list[int], continuations: list[list[int]], is_shared: bool
) -> None:
    batch = rows_of(prompts, continuations)
    row = share_prefixes(batch["input_ids"], scored(batch))
    assert (row is not None) == is_shared
    if row is not None:
        lengths = [length - 1 for group in continuations for length in group if length]
        assert row.input_ids.numel() == sum(prompts) + sum(lengths)


def test_large_masks_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = rows_of([5, 3], [[4, 1, 7], [2, 6, 3]])
    assert share_prefixes(batch["input_ids"], scored(batch)) is not None
    monkeypatch.setattr(sequence_layouts, "_MAX_MASK", 6 * 6 * (5 + 6) - 1)
    assert share_prefixes(batch["input_ids"], scored(batch)) is None


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each forward pass shares prefixes; filled by the passes."""
    result: list[bool] = []
    make_inputs = logprob_forward.model_inputs

    def observed(*args: Any, **options: Any) -> Any:
        inputs = make_inputs(*args, **options)
        result.append(inputs.shared_prefixes is not None)
        return inputs

    monkeypatch.setattr(logprob_forward, "model_inputs", observed)
    return result


def step(worker: TorchPolicyWorker, batch: BatchedDataDict) -> list[torch.Tensor]:
    """Return log-probabilities of the scored tokens, and the weights after one step."""
    masked = BatchedDataDict(batch, logprob_mask=batch["token_mask"])
    logprobs = worker.get_logprobs(masked) * batch["token_mask"]
    worker.train(batch, advantage_loss)
    return [logprobs, *(tensor.clone() for _, tensor in worker._model.full_tensors())]


@pytest.mark.parametrize("short_length", [128, 4], ids=["short", "long"])
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"batching": {"mode": "packed"}}),
        ("llama", {"lora": {"rank": 2}}),
        ("llama", {"activation_checkpointing": True}),
        ("qwen2", {}),
        ("qwen3", {"generation": {"temperature": 0.7}}),
    ],
    ids=["llama", "packed", "lora", "checkpointing", "qwen2", "qwen3"],
)
def test_training_with_shared_prefixes_equals_training_without(
    tmp_path: Path,
    layouts: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    config: dict[str, Any],
    short_length: int,
) -> None:
    monkeypatch.setattr(cpu_kernels, "MAX_SHORT_LENGTH", short_length)
    batch = rows_of([5, 3, 4], [[4, 1, 7], [2, 6, 3], [0, 5, 5]])
    model = make_model(tmp_path, family)
    shared = make_worker(model, max_sequence_length=16, **config)
    plain = make_worker(model, max_sequence_length=16, **config)
    assert shared._forward._shares_prefixes
    plain._forward._shares_prefixes = False
    layouts.clear()
    results = step(shared, batch.copy())
    assert layouts == [True, True]
    expected = step(plain, batch.copy())
    assert layouts == [True, True, False, False]
    for actual, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=2e-5)


def test_recorded_experts_are_kept_for_each_sequence(tmp_path: Path, layouts: list[bool]) -> None:
    worker = make_worker(make_moe(tmp_path), max_sequence_length=16)
    assert worker._forward._shares_prefixes
    batch = with_experts(rows_of([5, 3], [[4, 1, 7], [2, 6, 3]]))
    batch["logprob_mask"] = batch["token_mask"]
    layouts.clear()
    worker.get_logprobs(batch)
    assert layouts == [False]


@pytest.mark.parametrize(
    ("family", "config"),
    [("gemma3_text", {}), ("llama", {"attn_implementation": "eager"}), ("llama", {"precision": "bfloat16"})],
    ids=["windows", "eager", "bfloat16"],
)
def test_other_attention_does_not_share(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    worker = make_worker(make_model(tmp_path, family), max_sequence_length=16, **config)
    assert not worker._forward._shares_prefixes


def test_model_that_ignores_the_layout_does_not_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = cpu_kernels.cpu_attention

    def ignorant(*args: Any, shared_prefixes: Any = None, **options: Any) -> Any:
        return attend(*args, **options)

    monkeypatch.setattr(cpu_kernels, "cpu_attention", ignorant)
    worker = make_worker(make_model(tmp_path, "llama"), max_sequence_length=16)
    assert not worker._forward._shares_prefixes
