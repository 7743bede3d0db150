"""Tests that the page of environment variables matches the settings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from nemo_rl import settings

TOOL = Path(__file__).resolve().parents[2] / "tools" / "write_env_table.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_env_table", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_current(tool: ModuleType) -> None:
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run: python tools/write_env_table.py"


@pytest.mark.parametrize("variable", settings.ALL.values(), ids=lambda variable: variable.name)
def test_help_texts_fit_a_table_row(variable: settings.Variable) -> None:
    assert variable.help
    assert "\n" not in variable.help
    assert "|" not in variable.help
    assert variable.help.endswith(".")
