"""The documentation: it builds without a warning, its commands exist, and every page can be found."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from nemo_rl.cli import app

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
_COMMAND = re.compile(r"(?:^|`|\$ |uv run )nemo-rl ([^`\n]+)", re.MULTILINE)


def commands() -> Iterator[tuple[str, list[str]]]:
    for page in [*sorted(DOCS.glob("*.md")), REPOSITORY / "README.md"]:
        for match in _COMMAND.finditer(page.read_text(encoding="utf-8")):
            words = match[1].split("  ")[0].split("#")[0].strip()
            try:
                yield page.name, shlex.split(words.replace("\\", ""))
            except ValueError:
                continue  # a sentence, not a command


def test_every_command_in_the_docs_exists_with_its_options() -> None:
    found = list(commands())
    assert len(found) > 20
    for page, words in found:
        group = typer.main.get_command(app)
        while words and hasattr(group, "commands"):
            name = words.pop(0)
            if name.startswith(("-", ".")) or not re.fullmatch(r"[a-z]+[,;:.]?", name):
                break
            assert name.rstrip(",;:.") in group.commands, f"{page}: nemo-rl {name}"
            group = group.commands[name.rstrip(",;:.")]
        known = {option for parameter in group.params for option in parameter.opts}
        for word in words:
            if word == "--":
                break
            option = word.strip("[].,").partition("=")[0]
            if option.startswith("--"):
                assert option in known, f"{page}: {option} of nemo-rl {group.name}"


def test_every_page_is_in_the_navigation_and_the_other_way_round() -> None:
    navigation = (REPOSITORY / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = set(re.findall(r": ([\w-]+\.md)$", navigation, flags=re.MULTILINE))
    assert listed == {page.name for page in DOCS.glob("*.md")}


def test_relative_links_lead_somewhere() -> None:
    for page in [*DOCS.glob("*.md"), REPOSITORY / "README.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    from nemo_rl.venvs.installer import find_uv

    env = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "UV_PYTHON")}
    env |= {"UV_PROJECT_ENVIRONMENT": str(tmp_path / "venv"), "NO_MKDOCS_2_WARNING": "1"}
    command = [find_uv(), "run", "--locked", "--only-group", "docs", "mkdocs", "build", "--strict"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path / "site")],
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "quickstart" / "index.html").is_file()
