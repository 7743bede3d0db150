"""The configuration page is generated from the typed configuration."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from nemo_rl.utils.config import iter_keys

TOOL = Path(__file__).resolve().parents[2] / "tools" / "write_config_reference.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_config_reference", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(tool: ModuleType) -> None:
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run: python tools/write_config_reference.py"


def test_every_key_is_on_the_page_once(tool: ModuleType) -> None:
    page = tool.page()
    for title, _, schema in tool.JOBS:
        part = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        keys = [key.name for key in iter_keys(schema)]
        assert len(keys) > 20
        assert not [key for key in keys if part.count(f"\n| `{key}` |") < 1]
