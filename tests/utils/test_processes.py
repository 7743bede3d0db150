from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from nemo_rl.utils.processes import ProcessIdentity, program_of, start_time


def test_a_process_runs_until_it_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        identity = ProcessIdentity.of(process.pid)
        assert identity.is_running()
        assert not ProcessIdentity(process.pid, identity.start_ticks - 1).is_running()  # its id had another process
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie
        assert not identity.is_running()
    assert not identity.is_running()
    with pytest.raises(OSError, match=str(process.pid)):
        ProcessIdentity.of(process.pid)


def test_identity_survives_a_correction_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = ProcessIdentity.of(os.getpid())
    corrected = psutil.boot_time() + 1
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: corrected)
    monkeypatch.setattr(time, "time", lambda: corrected)
    assert psutil.Process().create_time() > corrected
    assert identity.is_running()
    assert identity == ProcessIdentity.of(os.getpid())


def test_program_of_a_process_that_has_ended_is_empty() -> None:
    command = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # for a moment after exec, it has no command line
        assert program_of(process.pid) == sys.executable
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie
        assert program_of(process.pid) == ""
    with pytest.raises(OSError, match=str(process.pid)):
        program_of(process.pid)


def test_start_time() -> None:
    before = time.time()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert before - 0.5 <= start_time(process.pid) <= time.time()
        process.kill()
