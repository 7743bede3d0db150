"""The notebook of the documentation, run in Jupyter's kernel, and a session of IPython on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_rl.venvs import ensure, spec_from_runtime_env
from nemo_rl.venvs.storage.layout import Store

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "tour.ipynb"

# Runs all cells twice in one kernel, as with "Run all cells".
RUN_NOTEBOOK = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3")
with client.setup_kernel():
    for run in ("first", "second"):
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        nbformat.write(notebook, f"{run}.ipynb")
"""

WORKERS = """
import pathlib
import time


class Counter:
    def __init__(self):
        self.calls = 0

    def block(self, started):
        self.calls += 1
        pathlib.Path(started).touch()
        time.sleep(3600)

    def state(self):
        return "STATE", {version!r}, self.calls
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the interpreter of a venv with Jupyter's kernel, nbclient and the packages of this interpreter."""
    spec = spec_from_runtime_env({"uv": ["ipykernel>=7", "ipython>=9", "nbclient>=0.10"]}, sys.executable)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMO_RL_COMPILE_BYTECODE", "0")
        return ensure(spec, "notebook", store=Store(tmp_path_factory.mktemp("venvs"))).python


@pytest.fixture
def session(tmp_path: Path) -> dict[str, str]:
    """Return the variables of a user's session, which pytest does not run."""
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTEST_VERSION"},
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
        "NEMO_RL_CACHE_DIR": str(tmp_path / "cache"),
        "NEMO_RL_VENV_DIR": str(tmp_path / "venvs"),
        "RAY_ADDRESS": "local",
        "TERM": "xterm",
    }


@pytest.mark.slow
def test_all_cells_run_twice(python: str, session: dict[str, str], tmp_path: Path) -> None:
    command = [python, "-c", RUN_NOTEBOOK, str(NOTEBOOK)]
    done = subprocess.run(command, cwd=tmp_path, env=session, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for run in ("first", "second"):
        results, errors = _outputs(tmp_path / f"{run}.ipynb")
        assert results == [
            "['hello, notebook', 'hello, notebook']",
            "['HELLO, NOTEBOOK!', 'HELLO, NOTEBOOK!']",
            "all workers are idle: True",
            "a call of Greeter was cancelled",
            "['hello, again!', 'hello, again!']",
            "['23.2', '23.2']",
            "['24.2', '24.2']",
            "True",
        ]
        assert errors.count("group Greeter: 2 workers ready in ") == 4
        assert errors.count("group Greeter: starting 2 workers\n") == 4
        assert errors.count(": ready in ") == (2 if run == "first" else 0)  # the second run finds both venvs


def _outputs(path: Path) -> tuple[list[str], str]:
    """Return the lines that the cells have printed or returned, and what they wrote to standard error."""
    results: list[str] = []
    errors = ""
    for cell in json.loads(path.read_text())["cells"]:
        for output in cell.get("outputs", []):
            text = output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"]
            if output.get("name") == "stderr":
                errors += "".join(text)
            elif "Writing" not in "".join(text) and "Overwriting" not in "".join(text):
                results += "".join(text).splitlines()
    return results, errors


class Terminal:
    """A program on a terminal."""

    def __init__(self, command: list[str], cwd: Path, env: dict[str, str]) -> None:
        self._end, child = pty.openpty()
        self._process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=child, stdout=child, stderr=child, start_new_session=True
        )
        os.close(child)
        self.shown = ""
        self._num_read = 0  # characters up to the end of the last match

    def send(self, text: str) -> None:
        """Type text."""
        os.write(self._end, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C: the terminal sends the signal to the program."""
        self._process.send_signal(2)

    def wait_for(self, pattern: str, timeout_s: float = 600) -> re.Match[str]:
        """Wait until the output behind the last match matches, and return the match."""
        deadline = time.monotonic() + timeout_s
        while (match := re.compile(pattern).search(self.shown, self._num_read)) is None:
            assert time.monotonic() < deadline, self.shown
            if select.select([self._end], [], [], 1.0)[0]:
                self.shown += os.read(self._end, 65536).decode(errors="replace")
        self._num_read = match.end()
        return match

    def close(self) -> None:
        """End the program."""
        self._process.terminate()
        self._process.wait()
        os.close(self._end)


@pytest.fixture
def ipython(python: str, session: dict[str, str], tmp_path: Path) -> Iterator[Terminal]:
    (tmp_path / "session_workers.py").write_text(WORKERS.format(version="first"))
    options = ["--simple-prompt", "--colors=NoColor", "--no-banner", "--no-confirm-exit"]
    terminal = Terminal([python, "-m", "IPython", *options], tmp_path, session)
    yield terminal
    terminal.close()


@pytest.mark.slow
def test_ipython_session(ipython: Terminal, tmp_path: Path) -> None:
    """Create a group, interrupt a call, run the same cell again, and edit the class in between."""
    ipython.wait_for(r"In \[1\]")
    ipython.send(
        "import sys; from nemo_rl.distributed.virtual_cluster import *; "
        "from nemo_rl.distributed.worker_groups import *; "
        "from nemo_rl.distributed.cluster.session import start_local_ray; start_local_ray(num_cpus=1); "
        "print('READY', 1)\n"
    )
    ipython.wait_for("READY 1")
    cell = (
        "cluster = RayVirtualCluster([1], use_gpus=False); group = RayWorkerGroup(cluster, "
        "RayWorkerBuilder('session_workers.Counter', py_executable=sys.executable)); "
        "print(group.get_all_worker_results(group.run_all_workers_single_data('state')))\n"
    )
    ipython.send(cell)
    ipython.wait_for("starting 1 workers")
    ipython.wait_for("group Counter: 1 workers ready in ")
    assert ipython.wait_for(r"\[\('STATE', '(\w+)', (\d+)\)\]").groups() == ("first", "0")

    ipython.send("group.get_all_worker_results(group.run_all_workers_single_data('block', started='started'))\n")
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    ipython.interrupt()
    ipython.wait_for("KeyboardInterrupt")
    ipython.send("print(group.get_all_worker_results(group.run_all_workers_single_data('state')))\n")
    assert ipython.wait_for(r"\[\('STATE', '(\w+)', (\d+)\)\]").groups() == ("first", "1")

    (tmp_path / "session_workers.py").write_text(WORKERS.format(version="second"))
    ipython.send(cell)
    assert ipython.wait_for(r"\[\('STATE', '(\w+)', (\d+)\)\]").groups() == ("second", "0")
    ipython.send("group.shutdown(); cluster.shutdown(); print('DONE', 1)\n")
    ipython.wait_for("DONE 1")
