"""A node that receives the driver's source: comparison, unpacking and import precedence."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nemo_rl.distributed.provisioning import source_sync
from nemo_rl.distributed.provisioning.source_receiver import HOOK_DIRECTORY, SourceListing, check_sources, unpack_source
from nemo_rl.distributed.provisioning.source_sync import _archive, _read, _source_root
from nemo_rl.errors import BroadcastError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEMO_RL_VENV_DIR", str(tmp_path / "venvs"))
    root = tmp_path / "project"
    (root / "mine").mkdir(parents=True)
    (root / "pyproject.toml").write_text("")
    (root / "mine" / "__init__.py").write_text("STATE = 'sent'\n")
    (root / "run.sh").write_text("")
    (root / "run.sh").chmod(0o755)
    return root


def read(root: Path) -> source_sync._Source:
    source = _read(str(root))
    assert source is not None
    return source


def elsewhere(listing: SourceListing, root: Path) -> SourceListing:
    """Return the listing for a node on which the driver's directory is `root`."""
    return listing._replace(root=str(root))


def test_node_with_the_same_files_lacks_nothing(project: Path, tmp_path: Path) -> None:
    listing = read(project).listing
    assert check_sources([listing], "ray") == ([False], [False], True)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", project, copy], check=True)
    assert check_sources([elsewhere(listing, copy)], "ray") == ([False], [False], True)
    (copy / "mine" / "__init__.py").write_text("STATE = 'late'\n")  # the same length
    assert check_sources([elsewhere(listing, copy)], "ray") == ([True], [True], True)


def test_node_reports_whether_it_can_import_the_package(project: Path) -> None:
    listing = read(project).listing
    assert check_sources([listing], "missing_package") == ([False], [False], False)


def test_received_source_precedes_older_files(project: Path, tmp_path: Path) -> None:
    source = read(project)
    listing = elsewhere(source.listing, tmp_path / "nothing")
    unpack_source(listing, _archive(source))
    assert check_sources([listing], "ray") == ([True], [False], True)
    target = Path(listing.target)
    assert os.access(target / "run.sh", os.X_OK)
    assert (target / "mine" / "__init__.py").stat().st_mode & 0o022 == 0
    old = tmp_path / "old"
    (old / "mine").mkdir(parents=True)
    (old / "mine" / "__init__.py").write_text("STATE = 'old'\n")
    (old / "sitecustomize.py").write_text("import builtins\nbuiltins.HIDDEN = 'ran'\n")
    path = os.pathsep.join(map(str, (target.parent / HOOK_DIRECTORY, target, old)))
    code = "import sys; sys.path.insert(0, sys.argv[1]); import mine; print(mine.STATE, HIDDEN)"
    command = [sys.executable, "-c", code, str(old)]
    process = subprocess.run(command, env={"PYTHONPATH": path}, cwd=old, check=True, capture_output=True, text=True)
    assert process.stdout.split() == ["sent", "ran"], process.stderr


def test_submodule_is_sent(project: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    (library / "code.py").touch()
    (project / "lib-b").touch()  # sorts before lib/code.py, and after lib
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always")
    for command in (
        ["init", "-q", library],
        ["-C", library, "add", "."],
        ["-C", library, "commit", "-qm", "library"],
        ["init", "-q", project],
        ["-C", project, "submodule", "--quiet", "add", library, "lib"],
        ["-C", project, "add", "."],
    ):
        subprocess.run([*git, *command], check=True, capture_output=True)
    source = read(project)
    listing = elsewhere(source.listing, tmp_path / "nothing")
    unpack_source(listing, _archive(source))
    assert (Path(listing.target) / "lib" / "code.py").is_file()
    assert check_sources([listing], "ray") == ([True], [False], True)


def test_damaged_source_is_replaced(project: Path, tmp_path: Path) -> None:
    source = read(project)
    listing = elsewhere(source.listing, tmp_path / "nothing")
    unpack_source(listing, _archive(source))
    unpack_source(listing, _archive(source))  # another job was first: nothing to do
    (Path(listing.target) / "mine" / "__init__.py").write_text("")
    assert check_sources([listing], "ray") == ([True], [True], True)
    unpack_source(listing, _archive(source))
    assert check_sources([listing], "ray") == ([True], [False], True)
    assert sorted(path.name for path in Path(listing.target).parent.iterdir()) == [Path(listing.target).name, "path"]


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out", "a\\..\\out"])
def test_archive_that_leads_out_is_rejected(project: Path, tmp_path: Path, name: str) -> None:
    listing = elsewhere(read(project).listing, tmp_path / "nothing")
    listing = listing._replace(files=(listing.files[0]._replace(path=name),))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(name, "")
    with pytest.raises(ValueError, match="would lead out"):
        unpack_source(listing, archive.getvalue())
    assert [path.name for path in Path(listing.target).parent.iterdir()] == [HOOK_DIRECTORY]


def test_file_edited_after_reading_is_sent_as_read(project: Path, tmp_path: Path) -> None:
    source = read(project)
    (project / "mine" / "__init__.py").write_text("STATE = 'late'\n")
    listing = elsewhere(source.listing, tmp_path / "nothing")
    unpack_source(listing, _archive(source))
    assert (Path(listing.target) / "mine" / "__init__.py").read_text() == "STATE = 'sent'\n"
    assert check_sources([source.listing], "ray") == ([True], [False], True)


def test_archive_that_differs_from_its_listing_is_rejected(project: Path, tmp_path: Path) -> None:
    source = read(project)
    (project / "mine" / "__init__.py").write_text("STATE = 'late'\n")
    with pytest.raises(ValueError, match=r"mine/__init__\.py changed while"):
        unpack_source(elsewhere(source.listing, tmp_path / "nothing"), _archive(read(project)))
    assert not Path(source.listing.target).exists()


def test_large_source_is_rejected_with_its_largest_files(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "weights.bin").write_bytes(bytes(1_100_000))
    monkeypatch.setenv("NEMO_RL_SOURCE_MAX_MB", "1")
    with pytest.raises(BroadcastError, match=r"NEMO_RL_SOURCE_MAX_MB=1 .* largest files: weights\.bin 1\.1 MB"):
        _archive(read(project))
    assert check_sources([read(project).listing], "ray").not_at_root == [False]
    copy = project.with_name("copy")
    subprocess.run(["cp", "-r", project, copy], check=True)
    assert check_sources([elsewhere(read(project).listing, copy)], "ray").not_at_root == [False]
    (copy / "weights.bin").write_bytes(b"")
    assert check_sources([elsewhere(read(project).listing, copy)], "ray").not_at_root == [True]


def test_job_output_is_not_sent(project: Path, tmp_path: Path) -> None:
    before = read(project).listing
    (project / "results" / "001").mkdir(parents=True)
    (project / "results" / "001" / "ray").symlink_to(tmp_path)  # as a run creates it
    (project / "data").symlink_to(tmp_path)
    (project / "mine" / "__pycache__").mkdir()
    (project / "mine" / "__pycache__" / "x.pyc").touch()
    assert read(project).listing == before
    (project / ".gitignore").write_text("models/\n")
    (project / "models").mkdir()
    (project / "models" / "config.json").touch()
    assert {file.path for file in read(project).listing.files} - {file.path for file in before.files} == {".gitignore"}


def test_source_root_of_a_directory(tmp_path: Path) -> None:
    workspace, member = tmp_path / "workspace", tmp_path / "workspace" / "member"
    script = member / "src" / "deep"
    script.mkdir(parents=True)
    (member / "pyproject.toml").touch()
    assert _source_root(script) == member
    (workspace / "uv.lock").touch()
    assert _source_root(script) == workspace  # its lock is needed to build a venv of the member
    (member / "uv.lock").touch()  # from a time before the workspace
    assert _source_root(script, {workspace}) == workspace
    (member / ".git").mkdir()
    assert _source_root(script, {workspace}) == member
    assert _source_root(tmp_path) is None
