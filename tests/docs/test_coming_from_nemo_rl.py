"""Tests that the page for users of NeMo RL states this project's defaults and names a test for every difference."""

from __future__ import annotations

import re
from pathlib import Path

from nemo_rl.algorithms.config import LossConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "coming-from-nemo-rl.md").read_text(encoding="utf-8")


def test_defaults_on_the_page() -> None:
    defaults = re.findall(r"^\| `\w+` \| [^|]* \| `loss\.(\w+)` \| ([\w.]+)", PAGE, re.MULTILINE)
    assert dict(defaults) == {name: str(getattr(LossConfig(), name)) for name, _ in defaults}
    assert {name for name, _ in defaults} == {"kl_coef", "importance_correction", "importance_cap"}


def test_every_difference_names_its_test() -> None:
    tables = re.findall(r"^\| you see .*\n\| ---.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) >= 8
    assert [row for row in rows if not re.search(r"`[\w/]+\.py::test_\w+` \|$", row)] == []
