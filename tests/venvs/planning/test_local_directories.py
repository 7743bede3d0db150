"""The directories of local packages in a lock, with and without parsing all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rl.venvs.planning.lock_graph import local_directories

AS_UV_WRITES = """version = 1

[manifest]
members = ["app", "library"]

[[package]]
name = "app"
source = { virtual = "." }
dependencies = [{ name = "library" }, { name = "virtualenv" }]

[package.optional-dependencies]
extra = [{ name = "virtualenv" }]

[[package]]
name = "library"
source = { editable = "packages/library" }

[[package]]
name = "other"
source = { directory = "../other" }

[[package]]
name = "virtualenv"
source = { registry = "https://example.org/simple" }
"""


@pytest.mark.parametrize(
    "lock",
    [
        AS_UV_WRITES,
        AS_UV_WRITES.replace("[[package]]", "[[ package ]]"),
        AS_UV_WRITES.replace("[[package]]", "[[ package ]]", 1),
        AS_UV_WRITES.replace('"virtualenv"\nsource', '"virtualenv"\ntext = "[[package]] editable"\nsource'),
        f'{AS_UV_WRITES}\n[[manifest.dependency-metadata]]\nname = "editable"\n',
    ],
    ids=["as uv writes it", "blanks", "blanks once", "in a string", "other tables"],
)
def test_all_local_packages_are_found(tmp_path: Path, lock: str) -> None:
    (tmp_path / "uv.lock").write_text(lock)
    assert local_directories(tmp_path) == [tmp_path, tmp_path / "packages" / "library", tmp_path.parent / "other"]


def test_lock_without_packages(tmp_path: Path) -> None:
    (tmp_path / "uv.lock").write_text("version = 1\n")
    assert local_directories(tmp_path) == []
