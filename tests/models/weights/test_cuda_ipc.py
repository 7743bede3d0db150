"""The allocator settings of `CudaIpcTransport`, as far as a CPU can test them; see tests/gpu for the rest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nemo_rl.models.weights.cuda_ipc import CudaIpcTransport


def allocator_settings() -> str:
    return torch._C._accelerator_getAllocatorSettings()


@pytest.fixture
def configured() -> Iterator[str]:
    before = allocator_settings()
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True,roundup_power2_divisions:[256:1,>:4]")
    yield allocator_settings()
    torch._C._accelerator_setAllocatorSettings(before)


def test_buffers_avoid_expandable_segments(configured: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = CudaIpcTransport("cpu")
    lend, seen = transport._buffers.lend, []

    def record_and_lend(num_bytes: int) -> torch.Tensor:
        seen.append(allocator_settings())
        return lend(num_bytes)

    monkeypatch.setattr(transport._buffers, "lend", record_and_lend)
    assert transport.allocate(5).numel() == 5
    assert seen == ["roundup_power2_divisions:[256:1,>:4],expandable_segments:False"]
    assert allocator_settings() == configured

    def fail(num_bytes: int) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(transport._buffers, "lend", fail)
    with pytest.raises(torch.OutOfMemoryError):
        transport.allocate(5)
    assert allocator_settings() == configured
