"""Describes what `bench_gpu.py` measures: device, model sizes, batch and sequence lengths."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Sets the device and the sizes of all topics.

    Attributes:
        device: "cuda" or "cpu".
        sizes: names in `one_process.SIZES`.
        repeats: rounds per case.
        num_tokens: tokens per sequence.
        batch: sequences per optimizer step.
        micro_batch: sequences per forward pass.
        matmul: rows and columns of the large matrices.
    """

    device: str
    sizes: tuple[str, ...]
    repeats: int
    num_tokens: int = 2048
    batch: int = 16
    micro_batch: int = 4
    matmul: int = 8192

    @property
    def precision(self) -> str:
        return "bfloat16"
