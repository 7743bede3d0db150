"""Runs the examples (`>>>`) in the docstrings of nemo_rl."""

from __future__ import annotations

import ast
import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "nemo_rl"
# Stacks that the driver's Python lacks. A docstring of a module that imports one uses an indented code block instead.
WORKER_STACKS = {"vllm", "megatron"}


def modules_with_examples() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(">>>" in docstring for docstring in docstrings(tree)):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), tree


def docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


MODULES = dict(modules_with_examples())


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_module(name: str) -> None:
    imported = {alias.name for node in ast.walk(MODULES[name]) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(MODULES[name]) if isinstance(node, ast.ImportFrom)}
    stacks = WORKER_STACKS & {module.partition(".")[0] for module in imported}
    assert not name.endswith("_worker"), f"{name} is imported only in its venv; use an indented code block"
    assert not stacks, f"{name} needs {stacks}; use an indented code block"
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted, f"no example of {name} was found"
    assert not result.failed


def test_public_data_structures_have_examples() -> None:
    assert {"nemo_rl.distributed.named_sharding", "nemo_rl.distributed.batched_data_dict"} <= MODULES.keys()
