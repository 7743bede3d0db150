"""What sharing a GPU's memory asks of torch's allocator, as far as a CPU shows it; `tests/gpu` has the rest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nemo_rl.models.weights.cuda_ipc import CudaIpcTransport


def settings() -> str:
    return torch._C._accelerator_getAllocatorSettings()


@pytest.fixture
def chosen() -> Iterator[str]:
    before = settings()
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True,roundup_power2_divisions:[256:1,>:4]")
    yield settings()
    torch._C._accelerator_setAllocatorSettings(before)


def test_buffers_are_not_in_expandable_segments_and_all_else_may_be(
    chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = CudaIpcTransport("cpu")
    lend, found = transport._buffers.lend, []

    def note_and_lend(num_bytes: int) -> torch.Tensor:
        found.append(settings())
        return lend(num_bytes)

    monkeypatch.setattr(transport._buffers, "lend", note_and_lend)
    assert transport.allocate(5).numel() == 5
    assert found == ["roundup_power2_divisions:[256:1,>:4],expandable_segments:False"]
    assert settings() == chosen

    def fail(num_bytes: int) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(transport._buffers, "lend", fail)
    with pytest.raises(torch.OutOfMemoryError):
        transport.allocate(5)
    assert settings() == chosen
