"""A damaged uv cache is recognised and named, and what the error advises works."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from sample_projects import Project, run_in

from nemo_rl import venvs
from nemo_rl.errors import DamagedCacheError
from nemo_rl.venvs import Store
from nemo_rl.venvs.building.build import site_packages_of
from nemo_rl.venvs.uv import find_uv


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A uv cache of this test's own: damage must not reach the user's cache."""
    cache = tmp_path / "uv_cache"
    shared = subprocess.run([find_uv(), "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()
    assert Path(shared) != cache
    monkeypatch.setenv("UV_CACHE_DIR", str(cache))
    monkeypatch.setenv("SHARED_CACHE", shared)
    return cache


def cached_file(cache: Path, name: str) -> Path:
    (path,) = (path for path in cache.glob(f"archive-v0/*/{name}"))
    return path


def write_in_place(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(content)


# Damage to alpha that uv does not notice: the file, and what happens to it.
INSTALLED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "emptied": ("alpha/__init__.py", lambda path: write_in_place(path, b"")),
    "cut": ("alpha/__init__.py", lambda path: write_in_place(path, path.read_bytes()[:5])),
    "copied over": ("alpha/__init__.py", lambda path: write_in_place(path, b"VERSION = 'from another tool'\n")),
    "removed": ("alpha/__init__.py", Path.unlink),
    "removed package": ("alpha", shutil.rmtree),
    "emptied RECORD": ("alpha-1.0.dist-info/RECORD", lambda path: write_in_place(path, b"")),
    "longer METADATA": (
        "alpha-1.0.dist-info/METADATA",
        lambda path: write_in_place(path, path.read_bytes() + b"X: y\n"),
    ),
}
# Damage that makes uv fail.
REFUSED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "zeros in RECORD": ("alpha-1.0.dist-info/RECORD", lambda path: write_in_place(path, bytes(200))),
    "removed METADATA": ("alpha-1.0.dist-info/METADATA", Path.unlink),
    "emptied METADATA": ("alpha-1.0.dist-info/METADATA", lambda path: write_in_place(path, b"")),
    "removed metadata": ("alpha-1.0.dist-info", shutil.rmtree),
    "removed archive": ("alpha", lambda path: shutil.rmtree(path.parent)),
    "zeros in the pointer": (
        "alpha",
        lambda path: [write_in_place(pointer, bytes(100)) for pointer in path.parents[2].rglob("alpha/*.rev")],
    ),
}


def clean_as_advised(message: str) -> None:
    """Run the command that an error names."""
    command = re.search(r"`(uv cache clean [^`]*)`", message)
    assert command, message
    subprocess.run([find_uv(), *shlex.split(command[1])[1:]], check=True, capture_output=True)


@pytest.mark.parametrize("damage", [*INSTALLED, *REFUSED])
def test_damaged_cache_is_named_and_the_remedy_works(project: Project, store: Store, cache: Path, damage: str) -> None:
    """The user does what the messages say, and nothing else."""
    first = venvs.ensure(project.command(), "A")
    file, alter = (INSTALLED | REFUSED)[damage]
    cached = cached_file(cache, file)
    installed = site_packages_of(first.path) / file
    assert installed.is_dir() or file.endswith("RECORD") or installed.samefile(cached), "uv has not linked the file"
    alter(cached)

    with pytest.raises(DamagedCacheError) as caught:
        venvs.ensure(project.command("--extra", "one"), "B")
    message = str(caught.value)
    if damage in INSTALLED:
        assert re.search(rf"{re.escape(file)}\S* of the package alpha \((altered|missing)", message)
        assert "UV_LINK_MODE=copy" in message
    assert "Run `uv cache clean alpha`, then build again." in message
    assert list(store.names()) == ["A"]
    assert store.digests() == [first.digest[:16]], "nothing half-built stays"

    clean_as_advised(message)
    second = venvs.ensure(project.command("--extra", "one"), "B")
    assert run_in(second.python, "import alpha; print(alpha.VERSION)") == "1.0"
    damaged = {(finding.venv, finding.package) for finding in venvs.verify()}
    assert damaged <= {("A", "alpha")}
    assert damaged or not file.endswith(".py") or not cached.exists(), "the file of A is a link to the damaged one"
    venvs.ensure(project.command(), "A", force_rebuild=True)
    assert venvs.verify() == []


def test_same_size_is_found_by_verify(project: Project, cache: Path) -> None:
    venvs.ensure(project.command(), "A")
    cached = cached_file(cache, "alpha/__init__.py")
    write_in_place(cached, cached.read_bytes().replace(b"1", b"6"))
    venvs.ensure(project.command("--extra", "one"), "B")
    assert {finding.venv for finding in venvs.verify()} == {"A", "B"}
    subprocess.run([find_uv(), "cache", "clean", "alpha"], check=True, capture_output=True)
    for name, options in (("A", ()), ("B", ("--extra", "one"))):
        venvs.ensure(project.command(*options), name, force_rebuild=True)
    assert venvs.verify() == []


def test_copies_keep_the_cache_whole(project: Project, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_LINK_MODE", "copy")
    first = venvs.ensure(project.command(), "A")
    write_in_place(site_packages_of(first.path) / "alpha" / "__init__.py", b"")
    second = venvs.ensure(project.command("--extra", "one"), "B")
    assert run_in(second.python, "import alpha; print(alpha.VERSION)") == "1.0"
    assert {finding.venv for finding in venvs.verify()} == {"A"}


def test_overlay_from_a_damaged_cache_is_refused(project: Project, cache: Path) -> None:
    venvs.ensure(project.command("--with", "epsilon"), "A")
    write_in_place(cached_file(cache, "epsilon/__init__.py"), b"")
    with pytest.raises(DamagedCacheError, match="uv cache clean epsilon"):
        venvs.ensure(project.command("--extra", "one", "--with", "epsilon"), "B")
