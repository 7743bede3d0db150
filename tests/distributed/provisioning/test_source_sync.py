"""The driver's source on nodes without it: hosts in separate namespaces that have only Ray and uv."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from package_index import make_wheel

from nemo_rl.venvs.uv import find_uv

REPOSITORY = Path(__file__).resolve().parents[3]
BENCHMARKS = REPOSITORY / "benchmarks"
JOB = Path(__file__).with_name("source_job")
PORT = 8198


def run(*command: object, cwd: Path | None = None) -> None:
    subprocess.run([str(word) for word in command], cwd=cwd, check=True, capture_output=True)


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="so-", dir="/tmp") as folder:  # Ray's sockets need a short path
        yield Path(folder)


@pytest.fixture
def users_project(scratch: Path) -> Path:
    """A user's repository with an uncommitted change that needs an untracked module."""
    root = scratch / "user"
    shutil.copytree(JOB, root, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "pyproject.toml").write_text(
        '[project]\nname = "mine"\nversion = "0"\nrequires-python = ">=3.11"\ndependencies = ["small==1.0"]\n'
        "[tool.uv]\npackage = false\n"
        f'[[tool.uv.index]]\nurl = "http://10.88.0.1:{PORT}/"\ndefault = true\n'
    )
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    run("git", "init", "--quiet", root)
    run("git", "-C", root, "add", "--all")
    run("git", *identity, "-C", root, "commit", "--quiet", "-m", "first")
    shutil.copytree(root, scratch / "stale")
    (root / "mine" / "fresh.py").write_text('WRITTEN = "changed"\n')
    worker = root / "mine" / "worker.py"
    worker.write_text(worker.read_text().replace('"committed"', '"not the new module"'))
    return root


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="namespaces need root and iproute2")
def test_host_with_only_ray_and_uv_runs_the_drivers_source(
    scratch: Path, users_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from broadcast_hosts import Hosts, on_network_of_host_0

    bare = scratch / "bare"
    run(find_uv(), "venv", "--quiet", "--python", sys.executable, bare)
    run(find_uv(), "pip", "install", "--quiet", "--python", bare, f"ray[default]=={ray.__version__}")
    make_wheel(scratch / "packages", "small")
    (scratch / "nothing").mkdir()
    (scratch / "nothing" / Path(sys.prefix).name).mkdir()
    kept = [Path(sys.prefix)] if Path(sys.prefix).is_relative_to(REPOSITORY) else []
    dropped = ("RAY_", "UV_", "NEMO_RL_", "NRL_", "PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    instead = {REPOSITORY: scratch / "nothing", users_project: scratch / "stale"}
    with Hosts(2, scratch, bare / "bin" / "python", environment, instead=instead, kept=kept) as hosts:
        index = [sys.executable, str(BENCHMARKS / "broadcast_registry.py"), str(scratch / "packages"), hosts.address(0)]
        with on_network_of_host_0(hosts, [*index, str(PORT), "1e9", str(scratch / "count")]):
            variables = {**hosts.driver_environment(), "UV_DEFAULT_INDEX": f"http://{hosts.address(0)}:{PORT}/"}
            lock = [find_uv(), "lock", "--quiet", "--no-cache", "--project", str(users_project)]
            subprocess.run(hosts.on_head(lock), env=variables, check=True, capture_output=True)
            run("git", "-C", users_project, "add", "uv.lock")
            job = [sys.executable, str(users_project / "job.py"), str(users_project), "2"]
            first, log = _run_job(hosts.on_head(job), variables, users_project)
            again, log_again = _run_job(hosts.on_head(job), variables, users_project)
    for answer in (first, again):
        for workers in (answer["system"], answer["small"]):
            assert {worker["node_id"] == answer["driver_node"] for worker in workers} == {True, False}
            assert [worker["written"] for worker in workers] == ["changed"] * 2
            for worker in workers:
                is_driver = worker["node_id"] == answer["driver_node"]
                assert is_driver or worker["child"] == "changed"
                assert worker["module"].startswith(str(users_project)) == is_driver
                assert worker["nemo_rl"].startswith(str(REPOSITORY)) == is_driver
        assert [worker["written"] for worker in answer["edited"]] == ["edited in the session"] * 2
        assert [worker["has_small"] for worker in answer["system"] + answer["small"]] == [False, False, True, True]
        assert len(answer["checked"]) == 2
        assert [fatal for fatal in answer["checked"].values() if fatal] == []
    assert (first["built"], again["built"]) == (True, False)
    received = f"source in {users_project}: 1 of 1 nodes received"
    assert (log.count(received), log_again.count(received)) == (2, 0)  # also the edited source


def _run_job(command: list[str], variables: dict[str, str], cwd: Path) -> tuple[dict[str, Any], str]:
    process = subprocess.run(command, env=variables, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr[-6000:]
    return json.loads(process.stdout.splitlines()[-1]), process.stderr
