"""The examples in docstrings that run without a cluster."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "module",
    ["nemo_rl.settings", "nemo_rl.venvs.ensure", "nemo_rl.venvs.planning.spec", "nemo_rl.venvs.storage.layout"],
)
def test_examples(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0
