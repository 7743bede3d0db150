"""Tests that Python on the pages compiles, runs, and matches the files that it quotes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
GUIDES = sorted((REPOSITORY / "docs").glob("adding-*.md"))
FIRST_PAGES = [
    REPOSITORY / "docs" / f"{name}.md" for name in ("first-worker", "dependency-management", "use-from-your-project")
]
_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Return (language, title, text) of every code block of a page."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_compile(page: Path) -> None:
    for language, _, text in blocks(page):
        if language == "python":
            compile(textwrap.dedent(text), str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_fits_88_columns(page: Path) -> None:
    fences = re.findall(r"^```[^\n]*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    wide = [line for text in fences for line in text.splitlines() if len(line) > 88]
    assert not wide, "\n".join(wide)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_titled_blocks_are_excerpts_of_their_file(page: Path) -> None:
    for _, title, text in blocks(page):
        if title:
            assert text in (REPOSITORY / title).read_text(encoding="utf-8"), f"{title} has no such lines:\n{text}"


def test_every_guide_shows_its_example() -> None:
    assert len(GUIDES) == 6
    for page in GUIDES:
        shown = {title for _, title, _ in blocks(page) if title}
        assert shown or "examples/backends" in page.read_text(encoding="utf-8"), page


@pytest.mark.parametrize("page", [*GUIDES, *FIRST_PAGES], ids=lambda page: page.stem)
def test_untitled_python_of_a_guide_runs(page: Path) -> None:
    script = "\n".join(text for language, title, text in blocks(page) if language == "python" and not title)
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_first_program_is_complete_on_both_pages() -> None:
    program = (REPOSITORY / "examples" / "hello_workers.py").read_text(encoding="utf-8").split('"""\n\n', 1)[1]
    for page in (REPOSITORY / "README.md", REPOSITORY / "docs" / "first-worker.md"):
        assert program in [text for _, title, text in blocks(page) if title == "examples/hello_workers.py"], page
