"""Tests that generated pictures in the documentation are up to date."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_broadcast_model_picture_is_up_to_date(tmp_path: Path) -> None:
    target = tmp_path / "model.svg"
    command = [sys.executable, REPOSITORY / "benchmarks" / "broadcast_model.py", "--picture", target]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "4,096" in done.stdout
    assert target.read_bytes() == (REPOSITORY / "docs" / "images" / "broadcast_model.svg").read_bytes()
    altered = subprocess.run([*command, "--unpack", "0.4"], capture_output=True, text=True, check=True)
    assert altered.stdout != done.stdout
    assert target.read_bytes() != (REPOSITORY / "docs" / "images" / "broadcast_model.svg").read_bytes()


def test_diagrams_are_up_to_date() -> None:
    tool = runpy.run_path(str(REPOSITORY / "tools" / "draw_diagrams.py"))
    assert len(tool["DIAGRAMS"]) >= 6
    for name, draw in tool["DIAGRAMS"].items():
        committed = (tool["IMAGES"] / f"{name}.svg").read_text(encoding="utf-8")
        assert committed == draw(), "run: python tools/draw_diagrams.py"


def test_learning_curve_is_drawn_from_its_metrics(tmp_path: Path) -> None:
    images, target = REPOSITORY / "docs" / "images", tmp_path / "curve.svg"
    metrics, shorter = images / "learning_curve.jsonl", tmp_path / "shorter.jsonl"
    command = [sys.executable, REPOSITORY / "tools" / "draw_learning_curve.py"]
    subprocess.run([*command, metrics, target], check=True)
    assert target.read_bytes() == (images / "learning_curve.svg").read_bytes()
    shorter.write_text("".join(metrics.read_text().splitlines(keepends=True)[:100]))
    subprocess.run([*command, shorter, target], check=True)
    assert target.read_bytes() != (images / "learning_curve.svg").read_bytes()


def test_pictures_load_nothing_from_other_hosts() -> None:
    for picture in (REPOSITORY / "docs" / "images").glob("*.svg"):
        text = picture.read_text(encoding="utf-8")
        assert "<script" not in text, picture
        assert not re.search(r'href="(?!#)', text), picture
