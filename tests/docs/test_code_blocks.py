"""Code on the pages: Python that compiles, excerpts of files that tests run, statements that work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
GUIDES = sorted((REPOSITORY / "docs").glob("adding-*.md"))
_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """(language, title, text) of every code block of a page."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_on_a_page_is_python(page: Path) -> None:
    for language, _, text in blocks(page):
        if language == "python":
            compile(textwrap.dedent(text), str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_block_with_a_files_name_is_an_excerpt_of_that_file(page: Path) -> None:
    for _, title, text in blocks(page):
        if title:
            assert text in (REPOSITORY / title).read_text(encoding="utf-8"), f"{title} has no such lines:\n{text}"


def test_every_guide_shows_the_example_that_it_is_about() -> None:
    assert len(GUIDES) == 5
    for page in GUIDES:
        shown = {title for _, title, _ in blocks(page) if title}
        assert shown or "examples/backends" in page.read_text(encoding="utf-8"), page


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_what_a_guide_tells_a_script_to_do_works(page: Path) -> None:
    script = "\n".join(text for language, title, text in blocks(page) if language == "python" and not title)
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
