"""A venv that `ensure` returned stays until its interpreter holds a lease, whatever other processes remove."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sample_projects import Project

from nemo_rl import venvs
from nemo_rl.venvs import Store, maintenance
from nemo_rl.venvs.storage.layout import remove_tree

# Gets a venv and, for each line of its input, runs an interpreter in it.
DRIVER = """
import json, subprocess, sys
from nemo_rl import venvs
venv = venvs.ensure(sys.argv[1], sys.argv[2])
print(json.dumps({"path": str(venv.path), "built": venv.built}), flush=True)
for line in sys.stdin:
    done = subprocess.run([venv.python, "-c", line], capture_output=True, text=True)
    print(json.dumps([done.returncode, done.stdout + done.stderr]), flush=True)
"""


class Driver:
    """Another process that holds a venv which `ensure` returned."""

    def __init__(self, command: str, name: str = "A") -> None:
        arguments = [sys.executable, "-c", DRIVER, command, name]
        self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.venv = self.answer()

    def answer(self) -> dict[str, object]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def run(self, code: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(code + "\n")
        self.process.stdin.flush()
        code, output = self.answer()
        assert code == 0, output
        return str(output).strip()

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.communicate()


@pytest.mark.parametrize("overlay", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_prune_keeps_what_another_process_was_handed(project: Project, overlay: bool, number: signal.Signals) -> None:
    command = project.command(*(["--with", "epsilon"] if overlay else []))
    driver = Driver(command)
    report = venvs.prune(keep_names=[])
    assert report.removed == []
    assert len(set(report.skipped)) == 1 + overlay  # with the base
    assert driver.run("import alpha; print(alpha.VERSION)") == "1.0"
    driver.end(number)
    assert len(venvs.prune(keep_names=[]).removed) == 1 + overlay


def test_warm_call_hands_the_venv_out_too(project: Project) -> None:
    venvs.ensure(project.command(), "A")
    driver = Driver(project.command())
    assert not driver.venv["built"]
    assert venvs.prune(keep_names=[]).removed == []
    driver.end()


def test_venv_that_a_name_no_longer_points_to_stays(project: Project) -> None:
    driver = Driver(project.command())
    project.lock(alpha="2.0")
    new = venvs.ensure(project.command(), "A")
    assert venvs.prune().removed == []
    assert driver.run("import os, sys; print(os.path.isdir(sys.prefix))") == "True"
    driver.end()
    (removed,) = venvs.prune().removed
    assert removed != new.digest[:16]


def test_forced_rebuild_keeps_the_replaced_directory(project: Project, store: Store) -> None:
    """The interpreter may have started from the old directory and not hold its lease yet."""
    driver = Driver(project.command())
    for _ in range(2):
        new = venvs.ensure(project.command(), "A", force_rebuild=True)
    old = Path(str(driver.venv["path"]))
    assert {old, new.path} <= set(store.builds(new.digest))
    driver.end()
    venvs.prune()
    assert store.builds(new.digest) == [new.path]


def test_two_holders_protect_independently(project: Project) -> None:
    first, second = Driver(project.command()), Driver(project.command(), "B")
    first.end()
    assert venvs.prune(keep_names=[]).removed == []
    second.end()
    assert len(venvs.prune(keep_names=[]).removed) == 1


def test_own_prune_is_not_held_up(project: Project) -> None:
    """A process that removes what it was handed itself knows what it does, and is protected again afterwards."""
    ready = venvs.ensure(project.command(), "A")
    assert venvs.prune(keep_names=[], dry_run=True).removed == [ready.digest[:16]]
    prune = f"from nemo_rl import venvs; print(venvs.prune(keep_names=[]).skipped == [{ready.digest[:16]!r}])"
    other = subprocess.run([sys.executable, "-c", prune], capture_output=True, text=True, check=True)
    assert other.stdout == "True\n"
    assert venvs.prune(keep_names=[]).removed == [ready.digest[:16]]


def test_ensure_during_a_removal_builds_again(project: Project, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that asks while `prune` deletes the files waits for it and builds."""
    old = venvs.ensure(project.command(), "A")
    drivers: list[Driver] = []
    started = threading.Event()

    def start() -> None:
        started.set()
        drivers.append(Driver(project.command()))

    thread = threading.Thread(target=start)

    def remove_slowly(path: Path) -> None:
        (path / "bin" / "python").unlink()
        thread.start()
        started.wait()
        thread.join(timeout=2)  # it cannot end before the removal
        assert drivers == []
        remove_tree(path)

    monkeypatch.setattr(maintenance, "remove_tree", remove_slowly)
    assert venvs.prune(keep_names=[]).removed == [old.digest[:16]]
    thread.join()
    (driver,) = drivers
    assert driver.venv["built"]
    assert driver.run("import alpha; print(alpha.VERSION)") == "1.0"
    driver.end()


def test_unreadable_lock_file_does_not_stop_ensure(project: Project, store: Store) -> None:
    ready = venvs.ensure(project.command(), "A")
    store.handed_out(ready.digest).unlink()
    os.mkdir(store.handed_out(ready.digest))
    driver = Driver(project.command())
    assert not driver.venv["built"]
    driver.end()
