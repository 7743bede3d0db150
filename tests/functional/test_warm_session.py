"""Jobs of a warm session, as a user runs them: `nemo-rl session start`, then the README's main job again and again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from grpo_jobs import ROOT, SMALL, command, has_saved, metrics, reproducible_metrics, wait_for

from nemo_rl.distributed.cluster.local_clusters import WarmSession
from nemo_rl.jobs import hand_over
from nemo_rl.utils.processes import ProcessIdentity

NEMO_RL = str(Path(sys.executable).with_name("nemo-rl"))


@dataclass
class Session:
    """A warm session of its own: its files are in a temporary directory."""

    environment: dict[str, str]

    def nemo_rl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [NEMO_RL, "session", *arguments], env=self.environment, capture_output=True, text=True, check=False
        )

    def status(self) -> dict:
        result = self.nemo_rl("status", "--json")
        assert result.stdout, f"`status` ended with {result.returncode}: {result.stderr}"
        status: dict = json.loads(result.stdout)
        return status

    def start_job(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(*SMALL, *arguments), env=self.environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run_job(self, *arguments: str) -> str:
        job = self.start_job(*arguments)
        errors = job.communicate()[1]
        assert job.returncode == 0, errors[-3000:]
        return errors

    def started_processes(self) -> int:
        """Return how many processes the templates have started."""
        logs = Path(self.status()["directory"]).glob("*.log")
        return sum(path.read_text().count("started process") for path in logs)

    def ready_templates(self) -> int:
        return len(list(Path(self.status()["directory"]).glob("*.sock")))


@pytest.fixture
def session() -> Iterator[Session]:
    with tempfile.TemporaryDirectory(prefix="nrl", dir="/tmp", ignore_cleanup_errors=True) as directory:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        session = Session({**environment, "TMPDIR": directory})
        started = session.nemo_rl("start", "--idle-minutes", "10")
        assert started.returncode == 0, started.stderr
        yield session
        session.nemo_rl("stop", "--force")


@pytest.mark.slow  # starts a session and five jobs
def test_jobs_start_from_templates_and_train_alike(session: Session, tmp_path: Path) -> None:
    steps = "grpo.max_num_steps=2"
    errors = session.run_job(steps, f"logger.log_dir={tmp_path / 'first'}")
    assert "joined the warm session" in errors
    assert session.started_processes() == 0
    wait_for(lambda: session.ready_templates() >= 3, None)  # driver, environment; policy and generation share one

    session.run_job(steps, f"logger.log_dir={tmp_path / 'second'}")
    assert session.started_processes() >= 4
    records = [reproducible_metrics(metrics(tmp_path / name)) for name in ("first", "second")]
    assert records[0] == records[1]
    attested = [json.loads((tmp_path / name / "attestation.json").read_text()) for name in ("first", "second")]
    assert [worker["venv_digest"] for worker in attested[0]] == [worker["venv_digest"] for worker in attested[1]]

    # Ctrl-C reaches the driver, and the same command continues.
    arguments = ("grpo.max_num_steps=400", f"logger.log_dir={tmp_path / 'third'}")
    job = session.start_job(*arguments)
    wait_for(lambda: has_saved(tmp_path / "third", 1), job)
    assert session.nemo_rl("stop").returncode == 1  # a job uses it
    job.send_signal(signal.SIGINT)
    errors = job.communicate(timeout=120)[1]
    assert job.returncode == 130, errors[-3000:]
    assert "run the same command to resume" in errors

    # A killed command takes its driver with it.
    job = session.start_job(*arguments)
    wait_for(lambda: has_saved(tmp_path / "third", 3), job)
    job.kill()
    wait_for(lambda: not session.status()["has_drivers"], None, seconds=60)

    status = session.status()
    pids = [status["process"], *(template["process"] for template in status["templates"])]
    processes = [ProcessIdentity.of(pid) for pid in pids]
    assert session.nemo_rl("stop").returncode == 0
    assert not any(process.is_running() for process in processes)
    wait_for(lambda: not _processes_under(session.environment["TMPDIR"]), None, seconds=60)
    assert session.nemo_rl("status").returncode == 1


def _processes_under(directory: str) -> list[str]:
    """Return the command lines that name a file in the directory: Ray's processes of the session, and its workers."""
    lines = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return [line for line in lines if directory in line]


def test_a_session_with_other_surroundings_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    session = WarmSession.of_this_process(tmp_path)
    assert session.difference() is None
    monkeypatch.setenv("NEMO_RL_ANYTHING", "1")  # each worker group receives it from its driver
    monkeypatch.setenv("SHLVL", "7")
    assert session.difference() is None
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("CUDA_HOME", "/x")
    assert session.difference() == "it has other values of CUDA_HOME, LD_PRELOAD"
    monkeypatch.chdir(tmp_path)
    assert session.difference() == "it has another working directory"


def test_only_a_plain_command_is_handed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    main = type(sys)("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "orig_argv", ["python", str(script)])
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    for path in [*ROOT.glob("examples/run_*.py"), Path(NEMO_RL)]:
        script.write_bytes(path.read_bytes())
        assert hand_over._is_plain_command(), path
    script.write_text("from nemo_rl.jobs.grpo_job import main\nREGISTRY = {}\nmain()\n")
    assert not hand_over._is_plain_command()
    script.write_text("from nemo_rl.jobs.grpo_job import main\nif __name__ == '__main__':\n    main()\n")
    assert hand_over._is_plain_command()
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", str(script)])
    assert not hand_over._is_plain_command()
