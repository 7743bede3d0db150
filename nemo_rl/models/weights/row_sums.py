"""What a digest takes from a tensor without moving it: a few bytes per row, computed where the tensor lies.

The bytes are read as 32-bit words w, in rows of `WORDS_PER_ROW`, and each row becomes the sum of w[i] * c[i] modulo
2^64, for fixed pseudo-random odd 64-bit c (multilinear hashing: Carter and Wegman, "Universal classes of hash
functions", 1979). One changed word always changes its row's sum; any other damage, which knows nothing of c, stays
unseen with a probability of at most 2^-32. It is no defence against somebody who wants to be unseen.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

WORDS_PER_ROW = 4096
_WORD_BYTES = 4
# 32 MiB of products, which stay in a GPU's cache on their way into the sums.
_ROWS_AT_ONCE = 1024


def row_sums(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor's bytes in row-major order, [ceil(bytes / 16 KiB)] int64 on its device; no bytes: [0].

    Does not wait for the device. What is missing in the last word counts as zeros.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.data_ptr() % _WORD_BYTES or data.numel() % _WORD_BYTES:
        data = torch.nn.functional.pad(data, (0, -data.numel() % _WORD_BYTES))  # a copy, which is aligned
    words = data.view(torch.int32)
    factors = _factors(str(tensor.device))
    num_rows = words.numel() // WORDS_PER_ROW
    rows = words[: num_rows * WORDS_PER_ROW].view(num_rows, WORDS_PER_ROW)
    sums = [(part * factors).sum(dim=1) for part in rows.split(_ROWS_AT_ONCE)] if num_rows else []
    rest = words[num_rows * WORDS_PER_ROW :]
    if rest.numel():
        sums.append((rest * factors[: rest.numel()]).sum(dim=0, keepdim=True))
    return torch.cat(sums) if sums else words.long()


@functools.cache
def _factors(device: str) -> torch.Tensor:
    drawn = np.random.Generator(np.random.PCG64(20_26)).integers(0, 2**63, WORDS_PER_ROW, dtype=np.int64)
    return torch.from_numpy(drawn * 2 + 1).to(device)
