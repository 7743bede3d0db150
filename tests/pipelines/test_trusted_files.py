"""Files that another user could have written are not unpickled."""

from __future__ import annotations

import ast
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_rl.errors import PipelineError
from nemo_rl.pipelines.failures import failed_tasks, write_failure
from nemo_rl.pipelines.spool import Entry, Spool, SpoolWriter
from nemo_rl.pipelines.tasks import EmptyTask
from nemo_rl.pipelines.trusted_files import append_private, read_trusted

SOURCES = Path(__file__).resolve().parents[2] / "nemo_rl"


class Trap:
    """Creates a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("mode", [0o602, 0o620, 0o666])
def test_group_or_world_writable_file_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    path.chmod(0o644)
    assert read_trusted(path) == b"content"
    path.chmod(mode)
    with pytest.raises(PipelineError, match=f"can be written by others .mode {mode:o}.*chmod go-w"):
        read_trusted(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    os.chown(path, 12345, -1)
    with pytest.raises(PipelineError, match="belongs to user 12345"):
        read_trusted(path)


def test_writable_failed_task_is_not_unpickled(tmp_path: Path) -> None:
    record = {"stage": "s", "task_id": "t", "lineage": "0", "error": "e", "traceback": "", "attempts": 1}
    path = write_failure(tmp_path / "failed", record, EmptyTask(), (1, 0)).with_suffix(".task")
    (failed,) = failed_tasks(tmp_path)
    assert isinstance(failed.load(), EmptyTask)
    path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    path.chmod(0o666)
    with pytest.raises(PipelineError, match="can be written by others"):
        failed.load()
    assert not (tmp_path / "sprung").exists()


def test_writable_spool_is_not_unpickled(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, 0)
    writer.write([Entry("gone", (0,))])
    writer.close()
    assert Spool.read(tmp_path).results(1) == ([], [])
    assert Spool.read(tmp_path).removed_keys(1) == {(0,)}
    (path,) = tmp_path.glob("*.log")
    path.chmod(0o666)
    with pytest.raises(PipelineError, match="can be written by others"):
        Spool.read(tmp_path)


def test_pickle_files_are_private_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        append_private(tmp_path / "spool").close()
        record = {"stage": "s", "lineage": "0"}
        task = write_failure(tmp_path, record, EmptyTask(), (1, 0)).with_suffix(".task")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "spool", task)] == [0o600, 0o600]


def test_no_other_module_unpickles_files() -> None:
    """Only data from Ray and from `trusted_files` is unpickled, and torch loads only weights."""
    from_ray = {"pipelines/bootstrap.py", "pipelines/executors/ray_data.py", "pipelines/executors/xenna.py"}
    from_disk = set()
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert call not in ("pickle.load", "cloudpickle.load", "joblib.load", "marshal.loads", "numpy.load"), path
            if call == "torch.load":
                assert "weights_only=True" in ast.unparse(node), path
            if call in ("pickle.loads", "cloudpickle.loads"):
                from_disk.add(path.relative_to(SOURCES).as_posix())
    for name in from_disk - from_ray:
        assert "trusted_files import" in (SOURCES / name).read_text(encoding="utf-8"), name
    assert len(from_disk - from_ray) == 4
