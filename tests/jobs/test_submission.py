"""Submits jobs through the command line to a real local Ray head with job server and token authentication."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemo_rl.errors import ConfigError
from nemo_rl.jobs.submission import Secret, Submission, parse_env

REPOSITORY = Path(__file__).resolve().parents[2]
SECRET = "hf_a_value_that_must_stay_secret"

Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_plain_secret_is_refused_and_not_printed() -> None:
    for submission in (
        Submission(["python", "x.py"], env={"HF_TOKEN": SECRET}),
        Submission(["python", "x.py", f"--wandb.api-key={SECRET}"]),
        Submission(["python", "x.py", "--api-key", SECRET]),
        Submission(["python", "x.py", f"https://user:{SECRET}@host/data.jsonl"]),
        Submission(["python", "x.py"], env={"X": f"https://u:{SECRET}@h"}),
        Submission(["python", "x.py"], working_dir=f"https://u:{SECRET}@h/s.zip"),
        Submission(["python", "x.py"], working_dir=f"ftp://u:{SECRET}@h/s.zip"),
        Submission(["python", "x.py"], py_modules=[f"https://{SECRET}@h/m.whl"]),
        Submission(["python", "x.py"], working_dir=f"https://h/s.zip?X-Amz-Signature={SECRET}"),
    ):
        with pytest.raises(ConfigError, match="--secret NAME") as caught:
            submission.check()
        assert SECRET not in str(caught.value)
    Submission(["python", "x.py", "policy.max_new_tokens=3"], env={"TOKENIZERS_PARALLELISM": "0"}).check()


def test_secret_is_a_reference_in_the_entrypoint() -> None:
    submission = Submission(["python", "a b.py"], secrets=[Secret.parse("T=/run/s"), Secret.parse("U")])
    assert submission.entrypoint.startswith('T="$(cat /run/s)" && export T && : "${U:?')
    assert submission.entrypoint.endswith("exec python 'a b.py'")


def _variables_of_job(folder: Path, submission: Submission, **environment: str) -> dict[str, str]:
    """Run the entrypoint in `folder`, which stands for the uploaded directory; return the job's variables."""
    entrypoint = replace(submission, command=["env"]).entrypoint
    done = subprocess.run(["sh", "-c", entrypoint], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if line.startswith("NEMO_RL_"))


def test_uploaded_directory_is_the_project_of_the_job(tmp_path: Path) -> None:
    local, uploaded = tmp_path / "local", tmp_path / "up loaded"
    for folder in (local, uploaded):
        folder.mkdir()
        (folder / "pyproject.toml").write_text('[project]\nname = "My.Project"\n')
    submission = Submission([], working_dir=str(local))
    clusters = {"NEMO_RL_PROJECT_ROOT": "/opt/other", "NEMO_RL_SOURCES": '{"/a": "/b"}', "HOME": "/home/me"}
    variables = _variables_of_job(uploaded, submission, **clusters)
    assert variables["NEMO_RL_PROJECT_ROOT"] == str(uploaded)
    assert json.loads(variables["NEMO_RL_SOURCES"]) == {"/uploaded/my-project": str(uploaded)}
    assert variables["NEMO_RL_VENV_DIR"] == "/home/me/.cache/nemo_rl/venvs"
    assert _variables_of_job(uploaded, submission, NEMO_RL_VENV_DIR="/disk")["NEMO_RL_VENV_DIR"] == "/disk"
    # The submission names another project.
    explicit = replace(submission, env={"NEMO_RL_PROJECT_ROOT": "/mine"})
    assert "NEMO_RL_SOURCES" not in _variables_of_job(uploaded, explicit, NEMO_RL_PROJECT_ROOT="/mine")
    # The uploaded directory is no project.
    (uploaded / "pyproject.toml").unlink()
    assert _variables_of_job(uploaded, submission, NEMO_RL_PROJECT_ROOT="/opt/x") == {"NEMO_RL_PROJECT_ROOT": "/opt/x"}


@pytest.mark.parametrize("text", ["1X", "X=relative/path", "X=", "X;rm -rf=/x", "X$(id)"])
def test_invalid_secret_reference_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--secret"):
        Secret.parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "a b/c"}, "--name 'a b/c': expected letters"),
        ({"working_dir": "s4://bucket/x.zip"}, "--working-dir s4://bucket/x.zip: Ray downloads only from https, s3"),
        ({"py_modules": ["ftp://host/m.zip"]}, "--py-module ftp://host/m.zip: Ray downloads only from"),
    ],
)
def test_invalid_name_or_uri_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Submission(["true"], **fields).check()


def test_env_needs_assignments() -> None:
    assert parse_env(["A=1", "B=x=y", "C="]) == {"A": "1", "B": "x=y", "C": ""}
    with pytest.raises(ConfigError, match="--env A: expected"):
        parse_env(["A"])


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """Start a head whose environment has a secret, and yield the environment of a client with its token."""
    gcs, server, agent = free_ports(3)
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, "PYTHONPATH": str(REPOSITORY)}
    env |= {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{server}", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    env.pop("RAY_ADDRESS", None)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True))
        log = stack.enter_context(open(Path(folder) / "head.log", "w+"))
        ports = [f"--port={gcs}", f"--dashboard-port={server}", f"--dashboard-agent-listen-port={agent}"]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *ports]
        command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1"]
        command += ["--num-cpus=2", "--num-gpus=0", "--disable-usage-stats", f"--temp-dir={folder}"]
        process = psutil.Popen(command, env={**env, "HF_TOKEN": SECRET}, stdout=log, stderr=log)
        stack.callback(kill_with_children, process)
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError):
                for port in (server, agent):
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            time.sleep(0.2)
        else:
            log.seek(0)
            pytest.fail(f"the head did not start: {log.read()}")
        yield env


def kill_with_children(process: psutil.Popen) -> None:
    processes = [*process.children(recursive=True), process] if process.is_running() else []
    for member in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(processes, timeout=400)


@pytest.fixture(scope="module")
def cli(head: dict[str, str]) -> Cli:
    def run(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nemo_rl.cli", *arguments]
        return subprocess.run(
            command, cwd=cwd, env={**head, **env}, capture_output=True, text=True, timeout=400, check=False
        )

    return run


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "sources"
    root.mkdir()
    (root / "job.py").write_text(
        "import os, sys, json\n"
        "print('argument', sys.argv[1:], 'variable', os.environ.get('GREETING'), flush=True)\n"
        "print('files', sorted(name for _, _, names in os.walk('.') for name in names), flush=True)\n"
        "print('token has', len(os.environ.get('HF_TOKEN', '')), 'characters', flush=True)\n"
        "with open(os.environ.get('OUT', os.devnull), 'w') as f: f.write(os.environ.get('HF_TOKEN', ''))\n"
        "sys.exit(int(os.environ.get('CODE', '0')))\n"
    )
    (root / "unwanted.log").write_text("x")
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *command], cwd=root, check=True)
    (root / "untracked.txt").write_text("x")
    return root


def test_job_gets_files_and_variables_and_returns_its_code(cli: Cli, sources: Path) -> None:
    done = cli(
        *("submit", "--exclude", "*.log", "--env", "GREETING=hello world", "--env", "CODE=7"),
        *("--", "python", "job.py", "--flag", "a b"),
        cwd=sources,
    )
    assert done.returncode == 7, done.stderr
    assert "argument ['--flag', 'a b'] variable hello world" in done.stdout
    assert "files ['job.py']" in done.stdout
    assert "untracked.txt (--untracked uploads them)" in done.stderr
    assert "FAILED with exit code 7" in done.stderr


@pytest.mark.slow  # starts a job
def test_secrets_reach_only_the_job(cli: Cli, sources: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "key"
    file.write_text("from a file")
    submit = ("submit", "--env", f"OUT={out}", "--name", "with-secret")
    done = cli(*submit, "--secret", "HF_TOKEN", "--", "python", "job.py", cwd=sources)
    assert done.returncode == 0, done.stderr
    assert out.read_text() == SECRET
    output = done.stdout + done.stderr + cli("status", "--json").stdout + cli("logs", "with-secret").stdout
    assert "with-secret" in output
    assert SECRET not in output
    done = cli("submit", "--env", f"OUT={out}", "--secret", f"HF_TOKEN={file}", "--", "python", "job.py", cwd=sources)
    assert done.returncode == 0, done.stderr
    assert out.read_text() == "from a file"


@pytest.mark.slow  # starts a job
def test_missing_secret_fails_before_the_command(cli: Cli, sources: Path) -> None:
    done = cli("submit", "--secret", "MISSING_TOKEN", "--", "python", "job.py", cwd=sources)
    assert done.returncode not in (0, 7)
    assert "MISSING_TOKEN: not set in the environment of the Ray head" in done.stdout
    assert "argument" not in done.stdout


@pytest.mark.slow  # starts a job
def test_job_can_be_followed_and_stopped(cli: Cli, head: dict[str, str], sources: Path) -> None:
    (sources / "long.py").write_text(
        "import time\nprint('started', flush=True)\nwhile True:\n    time.sleep(0.2)\n    print('on', flush=True)\n"
    )
    done = cli("submit", "--untracked", "--no-wait", "--name", "long-one", "--", "python", "long.py", cwd=sources)
    assert (done.returncode, done.stdout) == (0, "long-one\n"), done.stderr
    follower = subprocess.Popen(
        [sys.executable, "-m", "nemo_rl.cli", "logs", "-f", "long-one"],
        env=head,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with contextlib.closing(follower.stdout), contextlib.closing(follower.stderr):  # type: ignore[type-var]
        assert follower.stdout is not None
        assert any(line == "started\n" for line in follower.stdout)
        assert "RUNNING" in cli("status", "long-one").stdout
        assert "long-one" in cli("status").stdout
        again = cli("submit", "--name", "long-one", "--", "python", "long.py", cwd=sources)
        assert again.returncode == 2
        assert "there is a job 'long-one' at" in again.stderr
        assert "Traceback" not in again.stderr
        pipeline = f"{sys.executable} -m nemo_rl.cli logs -f long-one | head -n 3; exit ${{PIPESTATUS[0]}}"
        closed_pipe = subprocess.run(
            ["bash", "-c", pipeline], env=head, capture_output=True, text=True, timeout=400, check=False
        )
        assert (closed_pipe.returncode, closed_pipe.stderr) == (1, ""), "a closed pipe is not a lost connection"
        assert cli("stop", "long-one").returncode == 0
        assert follower.wait(timeout=400) == 130
    assert cli("stop", "long-one").returncode == 1
    assert cli("status", "long-one").returncode == 1
    listed = json.loads(cli("status", "--json").stdout)
    assert {"job_id": "long-one", "status": "STOPPED"}.items() <= next(
        job for job in listed if job["job_id"] == "long-one"
    ).items()


@pytest.mark.slow  # starts a job
def test_modules_from_directory_wheel_and_zip(cli: Cli, sources: Path, tmp_path: Path) -> None:
    package = tmp_path / "as_directory"
    package.mkdir()
    (package / "__init__.py").write_text("NAME = 'directory'\n")
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("as_zip/__init__.py", "NAME = 'zip'\n")
    wheel = tmp_path / "as_wheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("as_wheel/__init__.py", "NAME = 'wheel'\n")
        archive.writestr("as_wheel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: as-wheel\nVersion: 1.0\n")
        archive.writestr(
            "as_wheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("as_wheel-1.0.dist-info/RECORD", "")
    code = "import as_directory, as_zip, as_wheel; print([m.NAME for m in (as_directory, as_zip, as_wheel)])"
    modules = [word for path in (package, tmp_path / "some.zip", wheel) for word in ("--py-module", str(path))]
    done = cli("submit", *modules, "--", "python", "-c", code, cwd=sources)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "['directory', 'zip', 'wheel']" in done.stdout


def test_large_upload_is_refused(cli: Cli, sources: Path) -> None:
    (sources / "big.bin").write_bytes(b"x" * 300_000)
    done = cli("submit", "--untracked", "--max-size", "100kB", "--", "python", "job.py", cwd=sources)
    assert done.returncode == 2
    assert "Largest: big.bin (0.3 MB)" in done.stderr
    assert "submitted" not in done.stderr


def test_dry_run_lists_the_files_as_json(cli: Cli, sources: Path) -> None:
    done = cli(
        "submit", "--dry-run", "--json", "--", "python", "job.py", cwd=sources, RAY_API_SERVER_ADDRESS="http://x:1"
    )
    assert json.loads(done.stdout)["files"] == {"working_dir": ["job.py", "unwanted.log"]}


def test_wrong_token_error_names_the_variable(cli: Cli) -> None:
    done = cli("status", RAY_AUTH_TOKEN="b" * 64)
    assert done.returncode == 1
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr


def test_unknown_job_is_named(cli: Cli) -> None:
    for command in (("status",), ("logs",), ("logs", "-f"), ("stop",)):
        done = cli(*command, "unknown")
        assert done.returncode == 2, done.stderr
        assert "no job 'unknown'" in done.stderr


@contextlib.contextmanager
def second_network() -> Iterator[tuple[str, str]]:
    """Create a network namespace linked to this one; yield its name and the address of this side."""
    name, subnet = f"nrl{os.getpid() % 100000}", f"10.{77 + os.getpid() % 100}.{os.getpid() % 250}"
    commands = [
        f"ip netns add {name}",
        f"ip link add {name}a type veth peer name {name}b netns {name}",
        f"ip addr add {subnet}.1/24 dev {name}a",
        f"ip link set {name}a up",
        f"ip -n {name} addr add {subnet}.2/24 dev {name}b",
        f"ip -n {name} link set {name}b up",
        f"ip -n {name} link set lo up",
    ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
        yield name, f"{subnet}.1"
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)  # also deletes the link


class Forwarder(socketserver.BaseRequestHandler):
    """Forwards bytes to a port on localhost in both directions, like `ssh -L`."""

    port = 0

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as upstream:
            back = threading.Thread(target=self._copy, args=(upstream, self.request), daemon=True)
            back.start()
            self._copy(self.request, upstream)
            back.join()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2")
def test_submit_from_another_network_namespace(head: dict[str, str], sources: Path) -> None:
    port = int(head["RAY_API_SERVER_ADDRESS"].rpartition(":")[2])
    with second_network() as (name, address):
        handler = type("Handler", (Forwarder,), {"port": port})
        with socketserver.ThreadingTCPServer((address, 0), handler) as server:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://{address}:{server.server_address[1]}"
            cli = ["ip", "netns", "exec", name, sys.executable, "-m", "nemo_rl.cli", "submit"]
            unforwarded = subprocess.run([*cli, "--", "true"], cwd=sources, env=head, capture_output=True, check=False)
            done = subprocess.run(
                [*cli, "--address", url, "--", "python", "job.py", "remote argument"],
                cwd=sources,
                env=head,
                capture_output=True,
                text=True,
                timeout=400,
                check=False,
            )
            server.shutdown()
    assert unforwarded.returncode == 1, "the namespace reaches the head without the forwarded port"
    assert done.returncode == 0, done.stderr
    assert "argument ['remote argument']" in done.stdout
