"""Tests that the documentation builds without warnings, and that its links and names are valid."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import nemo_rl

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"


def test_navigation_lists_every_page() -> None:
    navigation = (REPOSITORY / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = set(re.findall(r": ([\w-]+\.md)$", navigation, flags=re.MULTILINE))
    assert listed == {page.name for page in DOCS.glob("*.md")}


def test_relative_links_exist() -> None:
    for page in [*DOCS.glob("*.md"), REPOSITORY / "README.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_included_files_have_no_relative_links() -> None:
    # The site shows them as pages of docs/, from where such a link leads elsewhere.
    included = [path for page in DOCS.glob("*.md") for path in re.findall(r'^--8<-- "([^:"]+)', page.read_text(), re.M)]
    assert "benchmarks/README.md" in included
    for path in included:
        targets = re.findall(r"\]\(([^)\s]+)", (REPOSITORY / path).read_text(encoding="utf-8"))
        assert not [target for target in targets if "://" not in target and not target.startswith("#")], path


def test_api_reference_names_exist() -> None:
    seen = 0
    for page in DOCS.glob("api-*.md"):
        for block in page.read_text(encoding="utf-8").split("\n::: ")[1:]:
            module, *options = block.split("\n")
            path = REPOSITORY / (module.replace(".", "/") + ".py")
            defined = set(re.findall(r"^(?:class |def |async def )?(\w+)[\[(:= ]", path.read_text(), re.MULTILINE))
            members = re.search(r"members: \[(.*)\]", "\n".join(options))
            for name in members[1].split(", ") if members else ():
                assert name in defined, f"{page.name}: {module} has no {name}"
                seen += 1
    assert seen > 40


def test_tables_have_headers() -> None:
    for page in [*DOCS.glob("*.md"), REPOSITORY / "README.md"]:
        headers = re.findall(r"^(\|.*\|)\n\| ?---", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert not [header for header in headers if not header.strip("| ")], page.name


def test_version_has_one_source() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert nemo_rl.__version__ == version
    assert f"\nversion: {version}\n" in (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{version}] - " in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version {version}" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path: Path) -> None:
    from nemo_rl.venvs.uv import find_uv

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
    site = tmp_path / "site"
    assert (site / "first-worker" / "index.html").is_file()
    assert (site / "source" / "examples" / "plugin" / "run_distance.py" / "index.html").is_file()
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'src="http' not in home, "the page loads something from another host"
    assert "RayWorkerBuilder" in home
    assert "py_executable" in (site / "search" / "search_index.json").read_text(encoding="utf-8")
