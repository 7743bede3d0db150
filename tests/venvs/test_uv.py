"""Calls of uv and of other commands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_rl.errors import UvNotFoundError, VenvBuildError, VenvError
from nemo_rl.venvs import uv
from nemo_rl.venvs.uv import BuildLog, run_command, run_uv

# Runs a command in a thread of a process that has several, and prints the process ids of it and of its child.
RUNNER = """
import os, shutil, sys, threading
from nemo_rl.venvs.uv import run_command
if sys.argv[1] == "without setpriv":
    which = shutil.which
    shutil.which = lambda name, **how: None if name == "setpriv" else which(name, **how)
threading.Thread(target=threading.Event().wait, daemon=True).start()
script = "sleep 600 & echo $$ $! >&2; exec sleep 600"
run = lambda: run_command(["sh", "-c", script], what="Waiting", env=dict(os.environ), on_line=print_line)
print_line = lambda line: print(line, flush=True)
threading.Thread(target=run).start()
"""


def test_unwritable_log_does_not_hide_uv_error(tmp_path: Path) -> None:
    # The name is too long: writing and looking fail, as they do in a directory that this user may not enter.
    with pytest.raises(VenvBuildError, match="no-such-command") as caught:
        run_uv(["no-such-command"], what="Trying", log=BuildLog(tmp_path / ("x" * 300)))
    assert caught.value.log_path == ""


def test_log_is_kept_only_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "build.log"
    with BuildLog(path, only_on_failure=True) as log:
        assert run_uv(["--version"], what="Asking", log=log).startswith("uv ")
        assert path.exists()
    assert not path.exists()
    with pytest.raises(VenvBuildError) as caught, BuildLog(path, only_on_failure=True) as log:
        run_uv(["no-such-command"], what="Trying", log=log)
    assert caught.value.log_path == str(path)
    assert "no-such-command" in path.read_text()


def test_command_and_directory_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UvNotFoundError, match=r"Trying: .*/absent is not an executable file"):
        run_command([str(tmp_path / "absent")], what="Trying", env={})
    with pytest.raises(VenvError, match=r"Trying: the directory .*/absent does not exist"):
        run_command([sys.executable], what="Trying", env={}, cwd=tmp_path / "absent")


def test_timeout_kills_command_and_children() -> None:
    with pytest.raises(VenvBuildError, match=r"killed: it took longer than 1 s") as caught:
        run_command(["sh", "-c", "sleep 600 & echo $! >&2; wait"], what="Trying", env=dict(os.environ), timeout_s=1.0)
    assert ends(int(caught.value.output_tail.split()[0]))


@pytest.mark.parametrize("how", ["with setpriv", "without setpriv"])
def test_sigkill_of_parent_ends_command_and_children(how: str) -> None:
    if how == "with setpriv" and shutil.which("setpriv") is None:
        pytest.skip("there is no setpriv here")
    runner = subprocess.Popen([sys.executable, "-c", RUNNER, how], stdout=subprocess.PIPE, text=True)
    assert runner.stdout is not None
    processes = [int(word) for word in runner.stdout.readline().split()]
    assert len(processes) == 2
    assert all(Path(f"/proc/{pid}").exists() for pid in processes)
    runner.send_signal(signal.SIGKILL)
    runner.communicate()
    assert all(ends(pid) for pid in processes)


@pytest.mark.parametrize("how", ["with setpriv", "without setpriv"])
def test_exit_code_of_a_command(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = uv._ending_with_parent() if how == "with setpriv" else [sys.executable, "-c", uv._RUN_IN_PYTHON]
    monkeypatch.setattr(uv, "_ending_with_parent", lambda: guard)
    assert run_command(["sh", "-c", "echo done"], what="Trying", env=dict(os.environ)) == "done\n"
    with pytest.raises(VenvBuildError, match="with exit code 3"):
        run_command(["sh", "-c", "exit 3"], what="Trying", env=dict(os.environ))
    with pytest.raises(VenvBuildError, match=f"with exit code {128 + signal.SIGTERM}"):
        run_command(["sh", "-c", "kill -TERM $$"], what="Trying", env=dict(os.environ))


def ends(pid: int) -> bool:
    """Return whether a process ends within 30 s."""
    for _ in range(300):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False
