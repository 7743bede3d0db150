"""Digests of local packages: which changes of a directory count."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from sample_projects import BUILD_SYSTEM, write_files

from nemo_rl.venvs.planning.local_packages import LocalPackage, metadata_digest

PYPROJECT = '[project]\nname = "lib"\nversion = "1"\n' + BUILD_SYSTEM
CODE = [
    *(
        f"src/lib/{name}/__init__.py"
        for name in ("dist", "build", "venv", "venvs", "env", "node_modules", "a.b", "lib")
    ),
    *(f"{name}/__init__.py" for name in ("dist", "build", "venv", "venvs")),  # a flat layout
    "build/lib/module.py",  # of a package `build`
    "build/data/table.csv",
    "src/lib/module.pyc",  # without a source file
    "src/lib/.hidden",
    "dist/notes.txt",
    "setup.cfg",
]
NOT_CODE = [
    ".git/index",
    "src/lib/__pycache__/module.cpython-311.pyc",
    ".mypy_cache/x",
    "build/lib.linux-x86_64/module.py",  # setuptools writes these when it builds
    "build/bdist.linux-x86_64/wheel",
    "build/lib/module.py",
    "lib.egg-info/PKG-INFO",
    "src/lib.egg-info/SOURCES.txt",
    "env/lib/python3/site-packages/x.py",
    "target/CACHEDIR.TAG",
    "target/output",
    "worker_venvs/.logs/a.log",
]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    write_files(root, {"pyproject.toml": PYPROJECT, "src/lib/__init__.py": "", "env/pyvenv.cfg": ""})
    (root / "worker_venvs" / ".store").mkdir(parents=True)
    return root


def digest(root: Path, *, editable: bool = False) -> str:
    return LocalPackage.read(str(root), editable=editable).digest


@pytest.mark.parametrize("file", CODE)
def test_every_file_of_a_copied_package_counts(library: Path, file: str) -> None:
    if file.startswith("build/lib/"):
        write_files(library, {"build/__init__.py": ""})
    (library / "env" / "pyvenv.cfg").unlink()
    seen = [digest(library)]
    for text in ("1", "2", None):
        write_files(library, {file: text})
        seen.append(digest(library))
    assert len(set(seen[:3])) == 3
    assert seen[3] == seen[0]


@pytest.mark.parametrize("file", NOT_CODE)
def test_files_that_no_build_reads_do_not_count(library: Path, file: str) -> None:
    (library / "target").mkdir()
    (library / "target" / "CACHEDIR.TAG").touch()
    before = digest(library)
    write_files(library, {file: "1"})
    assert digest(library) == before


def test_code_of_an_editable_package_does_not_count(library: Path) -> None:
    before = digest(library, editable=True)
    write_files(library, {"src/lib/__init__.py": "CODE = 2"})
    assert digest(library, editable=True) == before


def test_links_and_modes_count(library: Path, tmp_path: Path) -> None:
    write_files(tmp_path, {"shared/module.py": "1", "run": "1"})
    (library / "src" / "lib" / "shared").symlink_to(tmp_path / "shared")
    (library / "src" / "lib" / "run").symlink_to(tmp_path / "run")
    (library / "src" / "lib" / "around").symlink_to(library)
    (library / "src" / "lib" / "broken").symlink_to("nowhere")
    seen = [digest(library)]
    write_files(tmp_path, {"shared/module.py": "2"})
    seen.append(digest(library))
    write_files(tmp_path, {"run": "2"})
    seen.append(digest(library))
    (library / "src" / "lib" / "__init__.py").chmod(0o755)
    seen.append(digest(library))
    assert len(set(seen)) == 4


@pytest.mark.parametrize("editable", [True, False])
@pytest.mark.parametrize(
    ("keys", "changes"),
    [
        ('["pyproject.toml", "VERSION"]', "VERSION"),
        ('[{ file = "native/**/*.{c,h}" }]', "native/deep/er/x.h"),
        ('[{ file = "../shared.txt" }]', "../shared.txt"),
        ('[{ dir = "generated" }]', "generated/"),
        ('[{ env = "LIB_FLAGS" }]', "$LIB_FLAGS"),
        ("[{ git = true }]", "git commit"),
        ("[{ git = { commit = true } }]", "git commit"),
        ("[{ git = { tags = true } }]", "git tag"),
    ],
)
def test_cache_keys_count(
    library: Path, keys: str, changes: str, editable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(library), *identity, *arguments], check=True, capture_output=True)

    write_files(library, {"pyproject.toml": PYPROJECT + f"[tool.uv]\ncache-keys = {keys}\n"})
    if changes.startswith("git"):
        git("init")
        git("commit", "--allow-empty", "-m", "1")
    before = digest(library, editable=editable), metadata_digest(library)
    if changes.startswith("git"):
        git("commit", "--allow-empty", "-m", "2") if "commit" in changes else git("tag", "v2")
    elif changes.startswith("$"):
        monkeypatch.setenv(changes[1:], "2")
    elif changes.endswith("/"):
        (library / changes).mkdir()
    else:
        write_files(library, {changes: "2"})
    after = digest(library, editable=editable), metadata_digest(library)
    assert after[1] != before[1]
    assert after[0] != before[0]


def test_unreadable_metadata_is_left_to_uv(library: Path) -> None:
    before = digest(library)
    write_files(library, {"pyproject.toml": "not toml ["})
    assert digest(library) != before
    os.remove(library / "pyproject.toml")
    assert digest(library) != before
