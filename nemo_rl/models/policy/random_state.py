"""The states of the process's random number generators (Python, numpy, torch), as tensors."""

from __future__ import annotations

import math
import random

import numpy as np
import torch


def seed_everything(seed: int, rank: int) -> None:
    """Seed the three generators; every rank differently, the same pair always alike."""
    words = np.random.SeedSequence([seed, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def capture(device: torch.device) -> dict[str, torch.Tensor]:
    """The states as CPU tensors whose shapes are equal on all ranks; that of `device` too, where it is a GPU.

    A worker on a CPU asks no GPU, though it may see some: Ray hides them from workers that were given some only.
    """
    _, python_words, python_gauss = random.getstate()
    _, numpy_words, position, has_gauss, numpy_gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    state = {
        "python": torch.tensor(python_words, dtype=torch.int64),
        "numpy": torch.tensor([*numpy_words.tolist(), position, has_gauss], dtype=torch.int64),  # type: ignore[union-attr]
        # NaN stands for no spare normal deviate.
        "gauss": torch.tensor([math.nan if python_gauss is None else python_gauss, numpy_gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Undo all draws since `capture`. A state of a worker on a CPU leaves the GPU's generator as it is."""
    python_gauss, numpy_gauss = state["gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), None if math.isnan(python_gauss) else python_gauss))
    *numpy_words, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(numpy_words, dtype=np.uint32), position, has_gauss, numpy_gauss))
    torch.set_rng_state(state["torch"].contiguous())
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].contiguous(), device)
