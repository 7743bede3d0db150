"""Templates start processes by fork that are like processes started the usual way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.distributed.cluster import warm_session
from nemo_rl.distributed.cluster.template_client import Template, relevant_variables
from nemo_rl.distributed.cluster.warm_session import TemplateKeeper

SHOW_PROCESS = """
import json, os, signal, sys
before = sorted(name for name in ("yaml", "threads", "needs_ray", "sample") if name in sys.modules)
import sample
state = dict(before=before, value=sample.VALUE, arguments=sys.argv, directory=os.getcwd(), path=sys.path[0])
state |= dict(only=os.environ.get("ONLY_HERE"), set_by_import=os.environ.get("SET_BY_IMPORT"), name=__name__)
state |= dict(is_leader=os.getsid(0) == os.getpid(), pid=os.getpid(), umask=os.umask(0))
state |= dict(
    ignores_hangup=signal.getsignal(signal.SIGHUP) is signal.SIG_IGN,
    blocked=list(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    can_be_interrupted=signal.getsignal(signal.SIGINT) is signal.default_int_handler,
)
print(json.dumps(state))
print("an error", file=sys.stderr)
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Return a directory with the modules that the templates of these tests import."""
    directory = tmp_path / "packages"
    directory.mkdir()
    (directory / "sample.py").write_text("import os\nVALUE = 1\nos.environ['SET_BY_IMPORT'] = 'yes'\n")
    (directory / "ray.py").write_text("")
    (directory / "needs_ray.py").write_text("import ray\n")
    (directory / "mixed").mkdir()
    (directory / "mixed" / "__init__.py").write_text(
        "import importlib.util\nHAS_RAY = importlib.util.find_spec('ray')\n"
    )
    (directory / "mixed" / "plain.py").write_text("")
    (directory / "mixed" / "tries_ray.py").write_text("try:\n    import ray\nexcept ImportError:\n    ray = None\n")
    (directory / "mixed" / "hides_ray.py").write_text("try:\n    import ray\nexcept:\n    ray = None\n")
    (directory / "mixed" / "indirect.py").write_text("from mixed import tries_ray\n")
    (directory / "threads.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    (directory / "broken.py").write_text("raise ValueError('only in a worker')\n")
    return directory


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[TemplateKeeper]:
    directory = tmp_path / "session"
    directory.mkdir()
    keeper = TemplateKeeper(directory)
    yield keeper
    keeper.close()


class Caller:
    """Starts scripts through a template from another process, whose streams, variables and directory are known."""

    def __init__(self, session: Path, packages: Path, directory: Path) -> None:
        self.session, self.directory = session, directory
        self.environment = {"PYTHONPATH": str(packages), "PATH": os.environ["PATH"]}
        self.template = Template.of(session, sys.executable, self.environment)

    def start_template(self, keeper: TemplateKeeper, modules: list[str]) -> None:
        """Start the template that a first worker has asked for, and wait until it serves."""
        self.template.ask_for()
        (self.session / f"{self.template.key}.1.modules.json").write_text(json.dumps(modules))
        keeper.update(quiet_s=0.0)
        wait_until((self.session / f"{self.template.key}.sock").exists)

    def run(self, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a script through the template; exit code 7: there was none."""
        source = f"""
import os, signal, sys, time
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from nemo_rl.distributed.cluster.template_client import Template
os.umask(0o27)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
signal.signal(signal.SIGINT, signal.default_int_handler)
template = Template(Path({str(self.session)!r}), {self.template.key!r}, sys.executable, {{}})
started = template.start({{"script": {str(script)!r}, "arguments": [{str(script)!r}, *sys.argv[1:]]}})
if started is None:
    sys.exit(7)
print(started.pid, flush=True)
while True:  # until the process has ended
    try:
        os.kill(started.pid, 0)
    except ProcessLookupError:
        break
    time.sleep(0.01)
"""
        return subprocess.run(
            [sys.executable, "-c", source, *arguments],
            env={**self.environment, "ONLY_HERE": "x"},
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
        )


def wait_until(condition: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def caller(keeper: TemplateKeeper, packages: Path, tmp_path: Path) -> Caller:
    return Caller(keeper.directory, packages, tmp_path)


def test_a_process_has_the_state_of_its_caller(keeper: TemplateKeeper, caller: Caller, tmp_path: Path) -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a session in the background of a shell ignores it
    caller.start_template(keeper, ["yaml", "broken", "sample"])
    signal.signal(signal.SIGINT, previous)
    script = tmp_path / "script.py"
    script.write_text(SHOW_PROCESS)
    for _ in range(2):
        result = caller.run(script, "one", "two words")
        pid, state = result.stdout.splitlines()
        assert json.loads(state) == {
            "before": ["sample", "yaml"],
            "value": 1,
            "arguments": [str(script), "one", "two words"],
            "directory": str(tmp_path),
            "path": str(tmp_path),
            "only": "x",
            "set_by_import": "yes",
            "name": "__main__",
            "is_leader": True,
            "pid": int(pid),
            "umask": 0o27,
            "ignores_hangup": True,
            "blocked": [signal.SIGUSR1],
            "can_be_interrupted": True,
        }
        assert result.stderr == "an error\n"


def test_packages_that_cannot_be_copied_are_left_out(keeper: TemplateKeeper, caller: Caller, tmp_path: Path) -> None:
    caller.start_template(keeper, ["sample", "threads", "yaml", "needs_ray"])
    script = tmp_path / "script.py"
    script.write_text(SHOW_PROCESS)
    state = json.loads(caller.run(script).stdout.splitlines()[1])
    assert state["before"] == ["sample", "yaml"]
    assert state["set_by_import"] == "yes"


def test_modules_that_import_ray_are_left_out_and_not_their_package(
    keeper: TemplateKeeper, caller: Caller, tmp_path: Path
) -> None:
    names = ["mixed", "mixed.indirect", "mixed.plain", "mixed.hides_ray", "mixed.tries_ray", "yaml"]
    caller.start_template(keeper, names)
    script = tmp_path / "script.py"
    script.write_text(
        f"import json, sys\nbefore = [name for name in {names} if name in sys.modules]\n"
        "import mixed, mixed.indirect, mixed.hides_ray\n"
        "seen = [mixed.HAS_RAY, mixed.tries_ray.ray, mixed.hides_ray.ray]\n"
        "print(json.dumps([before, [value is not None for value in seen]]))\n"
    )
    before, seen = json.loads(caller.run(script).stdout.splitlines()[1])
    assert before == ["mixed", "mixed.plain", "yaml"]
    assert seen == [True, True, True]


def test_a_template_with_a_changed_file_starts_nothing(
    keeper: TemplateKeeper, caller: Caller, packages: Path, tmp_path: Path
) -> None:
    caller.start_template(keeper, ["sample"])
    (packages / "sample.py").write_text("VALUE = 2\n")
    script = tmp_path / "script.py"
    script.write_text(SHOW_PROCESS)
    assert caller.run(script).returncode == 7
    [pid] = keeper.process_ids().values()
    wait_until(lambda: not Path(f"/proc/{pid}/fd").exists() or not os.listdir(f"/proc/{pid}/fd"))
    # The next one has the new file.
    socket_path = caller.session / f"{caller.template.key}.sock"
    wait_until(lambda: keeper.update(quiet_s=0.0) or socket_path.exists())
    assert json.loads(caller.run(script).stdout.splitlines()[1])["value"] == 2


def test_a_caller_that_has_not_waited_starts_nothing(keeper: TemplateKeeper, caller: Caller, tmp_path: Path) -> None:
    caller.start_template(keeper, ["yaml"])
    script = tmp_path / "script.py"
    script.write_text(f"open({str(tmp_path / 'was_here')!r}, 'w').close()")
    import socket

    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(caller.session / f"{caller.template.key}.sock"))
    request = {"script": str(script), "arguments": [str(script)], "environment": {}, "directory": "/", "umask": 0}
    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
    pid = int(connection.makefile().readline())
    connection.close()
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert not (tmp_path / "was_here").exists()
    assert caller.run(script).returncode == 0
    assert (tmp_path / "was_here").exists()


def test_templates_end_with_their_keeper(keeper: TemplateKeeper, caller: Caller) -> None:
    caller.start_template(keeper, ["yaml"])
    [pid] = keeper.process_ids().values()
    keeper.close()
    assert not Path(f"/proc/{pid}").exists()
    assert not list(caller.session.glob("*.sock"))


def test_templates_that_import_end_with_their_keeper(
    keeper: TemplateKeeper, caller: Caller, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_session, "_REBUILD_AFTER_S", 0.0)
    monkeypatch.setattr(warm_session, "_END_TIMEOUT_S", 0.1)
    (packages / "slow.py").write_text("import time\ntime.sleep(600)\n")
    pids = []
    caller.template.ask_for()
    for number, modules in enumerate((["slow"], ["slow", "yaml"])):  # the second template replaces the first one
        (caller.session / f"{caller.template.key}.{number}.modules.json").write_text(json.dumps(modules))
        keeper.update(quiet_s=0.0)
        pids += keeper.process_ids().values()
    assert len(set(pids)) == 2
    keeper.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_template_is_started_when_the_imports_are_complete(keeper: TemplateKeeper, caller: Caller) -> None:
    caller.template.ask_for()
    keeper.update(quiet_s=0.0)
    assert keeper.process_ids() == {}
    (caller.session / f"{caller.template.key}.1.modules.json").write_text(json.dumps(["yaml"]))
    keeper.update(quiet_s=600.0)
    assert keeper.process_ids() == {}
    keeper.update(quiet_s=0.0)
    assert list(keeper.process_ids()) == [caller.template.key]


def test_key_depends_on_what_imports_may_read(tmp_path: Path) -> None:
    def key(**variables: str) -> str:
        return Template.of(tmp_path, sys.executable, {"HOME": "/root", **variables}).key

    assert key() == key(RAY_JOB_ID="02000000", RAY_RAYLET_PID="7", PWD="/", SSH_TTY="/dev/pts/1", COLUMNS="80")
    assert key() != key(OMP_NUM_THREADS="1")
    assert key() != key(PYTHONPATH="/x")
    assert key() != Template.of(tmp_path, "/other/python", {"HOME": "/root"}).key
    assert relevant_variables({"A": "1", "SHLVL": "2"}) == {"A": "1"}
