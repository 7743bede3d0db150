"""Row sums, and digests computed from them on the tensors' device."""

from __future__ import annotations

import pytest
import torch

from nemo_rl.models.weights.digest import WORDS_PER_ROW, WeightDigest, digest_tensors, row_sums
from nemo_rl.models.weights.interfaces import TensorSpec

ROW_BYTES = 4 * WORDS_PER_ROW


def random_bytes(num_bytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(num_bytes))


@pytest.mark.parametrize("num_bytes", [0, 1, 4, 6, ROW_BYTES - 1, ROW_BYTES, ROW_BYTES + 1, 3 * ROW_BYTES + 5])
def test_row_sums_shape(num_bytes: int) -> None:
    assert row_sums(random_bytes(num_bytes)).shape == (-(-num_bytes // ROW_BYTES),)
    assert row_sums(random_bytes(num_bytes)).dtype == torch.int64


def test_row_sum_formula() -> None:
    ones = row_sums(torch.eye(64, dtype=torch.int32)[:1])  # the first word is 1, the others 0
    rows = torch.zeros(2, WORDS_PER_ROW, dtype=torch.int32)
    rows[0, 0], rows[1, 0] = 3, -(2**31)
    assert torch.equal(row_sums(rows), torch.stack([3 * ones[0], -(2**31) * ones[0]]))
    assert int(ones) % 2 == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_row_sums_ignore_layout_and_alignment(dtype: torch.dtype) -> None:
    tensor = random_bytes(7 * ROW_BYTES).to(dtype).view(-1, 8)
    expected = row_sums(tensor)
    shifted = torch.empty(tensor.numel() + 1, dtype=dtype)[1:].view(tensor.shape)
    assert torch.equal(row_sums(shifted.copy_(tensor)), expected)
    assert torch.equal(row_sums(tensor.T.contiguous().T), expected)


def test_row_sums_detect_any_flipped_bit() -> None:
    data = random_bytes(2 * ROW_BYTES + 3)
    expected = row_sums(data)
    for position in (0, 5, ROW_BYTES - 1, ROW_BYTES, 2 * ROW_BYTES + 2):
        for bit in range(8):
            damaged = data.clone()
            damaged[position] ^= 1 << bit
            assert not torch.equal(row_sums(damaged), expected)


def test_row_sums_detect_larger_damage() -> None:
    weights = random_bytes(8 * ROW_BYTES).view(torch.int32).clone()
    expected = row_sums(weights)
    two_signs = weights.clone()
    two_signs[[1, 2]] ^= -(2**31)
    for damaged in (two_signs, weights.roll(1), weights.flip(0), torch.zeros_like(weights), -weights):
        assert (row_sums(damaged) != expected).any()
    rows = weights.view(-1, WORDS_PER_ROW)
    swapped = [("w", rows[[1, 0, *range(2, 8)]])]
    assert digest_tensors(swapped, on_gpu=True) != digest_tensors([("w", rows)], on_gpu=True)


def test_gpu_digest_covers_names_shapes_and_order() -> None:
    tensors = [("a", torch.ones(4, 2)), ("b", torch.zeros(3)), ("empty", torch.zeros(0))]
    expected = digest_tensors(tensors, on_gpu=True)
    assert digest_tensors(tensors, on_gpu=True) == expected != digest_tensors(tensors)
    for other in (tensors[::-1], [("c", tensors[0][1]), *tensors[1:]], [("a", torch.ones(2, 4)), *tensors[1:]]):
        assert digest_tensors(other, on_gpu=True) != expected


def test_copy_in_digests_the_copy() -> None:
    source, target = torch.randn(5, 3).T, torch.empty(3, 5, dtype=torch.bfloat16)
    digest = WeightDigest(on_gpu=True)
    digest.copy_in(TensorSpec("w", "bfloat16", (3, 5), 0), source, target)
    assert torch.equal(target, source.bfloat16())
    assert digest.hexdigest() == digest_tensors([("w", source.bfloat16())], on_gpu=True)
