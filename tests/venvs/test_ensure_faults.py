"""Failures around a build, with real processes, mounts and sockets."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from sample_projects import BUILD_SYSTEM, Project, make_wheel, run_in, uv

from nemo_rl import venvs
from nemo_rl.errors import NoSpaceError, VenvBuildError, VenvError, VenvLockTimeoutError
from nemo_rl.venvs import Store
from nemo_rl.venvs.storage.manifest import MANIFEST_FILE

NUM_MODULES = 400
BUILDER = """
import json, sys
from nemo_rl import venvs
print("ready", flush=True)
sys.stdin.readline()
def report(event):
    print(json.dumps([event.phase, event.state, event.detail]), flush=True)
venv = venvs.ensure(sys.argv[1], sys.argv[2], progress=report)
print(json.dumps({"python": venv.python, "built": venv.built, "path": str(venv.path)}), flush=True)
"""


@pytest.fixture
def large(project: Project, tmp_path: Path) -> Project:
    """A project whose build takes long enough to be interrupted in every phase."""
    large = Project(project.root, tmp_path / "large_wheels")
    make_wheel(large.wheels, "alpha", "1.0", num_modules=NUM_MODULES)
    for name in ("beta", "delta", "epsilon"):
        make_wheel(large.wheels, name, "1.0")
    large.lock()
    return large


def start_builder(command: str, name: str) -> subprocess.Popen[str]:
    """Start a process that calls `ensure` after `go`."""
    builder = subprocess.Popen(
        [sys.executable, "-c", BUILDER, command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert builder.stdout is not None
    assert builder.stdout.readline() == "ready\n"
    return builder


def go(builder: subprocess.Popen[str]) -> None:
    assert builder.stdin is not None
    builder.stdin.write("go\n")
    builder.stdin.flush()


def answer(builder: subprocess.Popen[str]) -> dict[str, object]:
    output, _ = builder.communicate(timeout=400)
    assert builder.returncode == 0
    return json.loads(output.splitlines()[-1])


def processes_in(path: Path) -> list[str]:
    """Return ids of live processes whose command line or environment contains `path`."""
    process_ids = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (
                entry.name.isdigit()
                and os.fsencode(path)
                in (entry / "cmdline").read_bytes()
                + (entry / "environ").read_bytes().partition(b"UV_PROJECT_ENVIRONMENT=")[2]
            ):
                process_ids.append(entry.name)
    return process_ids


def kill_builders(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_kills: int, seed: int) -> None:
    rng = random.Random(seed)
    venvs.ensure(project.command(), "A")  # fills uv's cache, so that the next build takes as long as those after it
    monkeypatch.setenv("NEMO_RL_VENV_DIR", str(tmp_path / "undisturbed"))
    start = time.monotonic()
    venvs.ensure(project.command(), "A")
    undisturbed_s = time.monotonic() - start
    num_unsealed = 0
    for kill in range(num_kills):
        store = Store(tmp_path / f"venvs_{kill}")
        monkeypatch.setenv("NEMO_RL_VENV_DIR", str(store.root))
        victim, waiter = start_builder(project.command(), "A"), start_builder(project.command(), "B")
        go(victim)
        time.sleep(rng.uniform(0, undisturbed_s))
        if kill % 2:
            go(waiter)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        num_unsealed += not store.names()
        if not kill % 2:
            go(waiter)
        result = answer(waiter)

        count = "import alpha, pathlib; print(len(list(pathlib.Path(alpha.__file__).parent.glob('module_*.py'))))"
        assert run_in(str(result["python"]), count) == str(NUM_MODULES)
        assert venvs.verify(store=store) == []
        assert not venvs.ensure(project.command(), "A").built
        (digest,) = store.digests()
        assert [str(path) for path in store.builds(digest)] == [result["path"]]
        assert not processes_in(store.root)
    assert num_unsealed > 0, "every kill came after the seal, so the test proves nothing"


def test_sigkill_leaves_no_venv(large: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_builders(large, tmp_path, monkeypatch, num_kills=5, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sigkill_at_any_moment_leaves_no_venv(large: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_builders(large, tmp_path, monkeypatch, num_kills=60, seed=2)


@pytest.mark.parametrize("phase", ["fetch", "link", "compile", "check", "seal"])
def test_sigkill_in_each_phase_leaves_no_venv(phase: str, large: Project, store: Store) -> None:
    victim = start_builder(large.command(), "A")
    go(victim)
    assert victim.stdout is not None
    for line in victim.stdout:
        if json.loads(line)[:2] == [phase, "started"]:
            break
    victim.send_signal(signal.SIGKILL)
    victim.communicate()

    ready = venvs.ensure(large.command(), "B")
    assert run_in(ready.python, f"import alpha.module_{NUM_MODULES - 1}") == ""
    assert venvs.verify() == []
    assert store.builds(ready.digest) == [ready.path]


def test_uv_ends_with_its_builder(project: Project, store: Store) -> None:
    """uv waits for a build back end that does not end. Neither may outlive the builder."""
    started = project.root / "started"
    (project.root / "backend.py").write_text(
        f"import time\ndef build_editable(*a, **k):\n    open({str(started)!r}, 'w').close()\n    time.sleep(3600)\n"
    )
    text = (project.root / "pyproject.toml").read_text().replace(BUILD_SYSTEM, "")
    backend = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (project.root / "pyproject.toml").write_text(text + backend)
    victim = start_builder(project.command(), "A")
    go(victim)
    deadline = time.monotonic() + 600
    while not started.exists():
        assert victim.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(processes_in(store.root)) > 2  # uv, its back end, and the process that waits for the builder's end
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    while processes_in(store.root) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_in(store.root) == []


def test_concurrent_processes_cause_one_build(large: Project, store: Store) -> None:
    builders = [start_builder(large.command(), f"worker.{i % 4}") for i in range(16)]
    for builder in builders:
        go(builder)
    results = [answer(builder) for builder in builders]
    assert sum(bool(result["built"]) for result in results) == 1
    assert len({result["path"] for result in results}) == 1
    (digest,) = store.digests()
    assert len(store.builds(digest)) == 1
    assert len(list(store.logs.iterdir())) == 1


def test_lock_timeout_names_the_holder(project: Project, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = venvs.plan(project.command()).digest
    store.directory.mkdir(parents=True, exist_ok=True)
    hold = (
        "import sys; from pathlib import Path; from nemo_rl.venvs.storage.locks import build_lock\n"
        "with build_lock(Path(sys.argv[1]), 'holder.Worker'): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(store.lock(digest))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setenv("NEMO_RL_VENV_LOCK_TIMEOUT_S", "0.2")
    events: list[venvs.Progress] = []
    with pytest.raises(VenvLockTimeoutError, match=rf"process {holder.pid} on .*holder\.Worker"):
        venvs.ensure(project.command(), "A", progress=events.append)
    assert any(event.phase == "wait" and str(holder.pid) in event.detail for event in events)
    holder.kill()  # the kernel releases its lock, regardless of the content of the file
    holder.communicate()
    assert venvs.ensure(project.command(), "A").built


class Index(http.server.SimpleHTTPRequestHandler):
    """A package index: /<name>/ lists the wheels of that name."""

    def do_GET(self) -> None:
        name = self.path.strip("/")
        if "." in name:
            super().do_GET()
            return
        wheels = [path for path in Path(self.directory).iterdir() if path.name.startswith(f"{name}-")]
        links = [(wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest()) for wheel in wheels]
        body = "".join(f'<a href="/{wheel}#sha256={digest}">{wheel}</a>' for wheel, digest in links).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def indexed(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A locked project whose index has become silent: it accepts connections and never answers."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Index, directory=str(project.wheels))) as server:
        port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        text = (project.root / "pyproject.toml").read_text()
        text = "".join(line for line in text.splitlines(True) if not line.startswith(("no-index", "find-links")))
        text += f'[[tool.uv.index]]\nurl = "http://user:hunter2@127.0.0.1:{port}"\ndefault = true\n'
        (project.root / "pyproject.toml").write_text(text)
        uv("lock", "--cache-dir", str(tmp_path / "cache_1"), cwd=project.root)
        server.shutdown()
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache_2"))
    monkeypatch.setenv("UV_HTTP_TIMEOUT", "1")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with socket.create_server(("127.0.0.1", port)):
        yield project


def test_silent_index_is_an_error_that_names_the_package(indexed: Project, store: Store) -> None:
    with pytest.raises(VenvBuildError, match="alpha") as caught:
        venvs.create_local_venv(indexed.command(), "A")
    assert "timed out" in str(caught.value)
    log = Path(caught.value.log_path).read_text()
    assert "hunter2" not in str(caught.value) + log + repr(caught.value.__dict__)
    assert all(not store.builds(digest) for digest in store.digests())
    with pytest.raises(VenvBuildError, match="nowhere-to-be-found") as caught:
        venvs.create_local_venv(indexed.command("--with", "nowhere-to-be-found"), "A")
    assert "timed out" in Path(caught.value.log_path).read_text()


def test_uv_call_times_out(indexed: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_HTTP_TIMEOUT", "600")
    monkeypatch.setenv("NEMO_RL_VENV_BUILD_TIMEOUT_S", "2")
    with pytest.raises(VenvBuildError, match="NEMO_RL_VENV_BUILD_TIMEOUT_S"):
        venvs.create_local_venv(indexed.command(), "A")


@contextlib.contextmanager
def mounted(path: Path, *arguments: str) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    path.mkdir(parents=True, exist_ok=True)
    process = subprocess.run(["mount", *arguments, str(path)], capture_output=True, text=True, check=False)
    if process.returncode != 0:
        pytest.skip(f"cannot mount on this machine: {process.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_full_disk(project: Project, store: Store) -> None:
    make_wheel(project.wheels, "huge", "1.0", num_modules=4000)
    with mounted(store.root, "-t", "tmpfs", "-o", "size=2m", "tmpfs"):
        ready = venvs.ensure(project.command(), "A")
        with pytest.raises(NoSpaceError, match="prune") as caught:
            venvs.ensure(project.command("--with", "huge"), "A")
        assert caught.value.node
        assert [path for digest in store.digests() for path in store.builds(digest)] == [ready.path]
        assert run_in(ready.python, "import alpha; print(alpha.VERSION)") == "1.0"
        assert not venvs.ensure(project.command(), "A").built


def test_read_only_store_serves_a_sealed_venv(project: Project, store: Store) -> None:
    ready = venvs.ensure(project.command("--with", "epsilon"), "A")
    with mounted(store.root, "--bind", str(store.root)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(store.root)], check=True)
        warm = venvs.ensure(project.command("--with", "epsilon"), "A")
        assert (warm.python, warm.path, warm.built) == (ready.python, ready.path, False)
        assert run_in(warm.python, "import alpha, epsilon; print(alpha.VERSION)") == "1.0"
        renamed = venvs.create_local_venv(project.command("--with", "epsilon"), "Another")
        assert renamed == str(ready.stable_path / "bin" / "python")
        with venvs.hold_lease(ready.path):
            assert venvs.verify() == []
        assert len(venvs.list_venvs()) == 2
        with pytest.raises(VenvError, match="cannot be written"):
            venvs.create_local_venv(project.command("--extra", "one"), "B")
        with pytest.raises(VenvError, match="cannot be pruned"):
            venvs.prune(keep_names=[])


def test_read_only_store_reports_use(project: Project, store: Store) -> None:
    venv = venvs.ensure(project.command(), "A")
    with mounted(store.root, "--bind", str(store.root)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(store.root)], check=True)
        assert [info.in_use for info in venvs.list_venvs()] == [False]
        with venvs.hold_lease(venv.path):
            assert [info.in_use for info in venvs.list_venvs()] == [True]


@pytest.mark.parametrize("damage", ["no_manifest", "cut_manifest", "foreign_manifest", "no_python", "dangling_python"])
def test_broken_manifest_or_interpreter_is_rebuilt(damage: str, project: Project, store: Store) -> None:
    ready = venvs.ensure(project.command(), "A")
    manifest, python = ready.path / MANIFEST_FILE, ready.path / "bin" / "python"
    if damage == "no_manifest":
        manifest.unlink()
    elif damage == "cut_manifest":
        manifest.write_bytes(manifest.read_bytes()[:100])
    elif damage == "foreign_manifest":
        manifest.write_text(manifest.read_text().replace(ready.digest, "0" * 64))
    else:
        python.unlink()
        if damage == "dangling_python":
            python.symlink_to("/nowhere/python3")
    assert venvs.find_sealed(ready.digest) is None

    repaired = venvs.ensure(project.command(), "A")
    assert repaired.built
    assert run_in(repaired.python, "import alpha; print(alpha.VERSION)") == "1.0"
    assert store.builds(ready.digest) == [repaired.path]


def test_broken_base_of_an_additive_venv_is_rebuilt(project: Project) -> None:
    ready = venvs.ensure(project.command("--with", "epsilon"), "A")
    base = venvs.find_sealed(venvs.plan(project.command()).digest)
    assert base is not None
    (base.path / "bin" / "python").unlink()
    repaired = venvs.ensure(project.command("--with", "epsilon"), "A")
    assert run_in(repaired.python, "import alpha, epsilon; print(alpha.VERSION)") == "1.0"
    assert repaired.digest == ready.digest
