"""Runs the episodes of one environment in a child process, whose Python may be another one than this process's.

::

    EpisodeProcess ──stdin:  {"requests": [...]}──► episode_child ──► EpisodeHost
                   ◄─stdout: {"replies": [...]}───
                     stderr: what the environment writes, also to its stdout

The child needs nothing but Python 3.10 and what the environment imports. It finds `nemo_rl` and the source directories
of this process on its PYTHONPATH, but none of the packages that are installed here. It ends with its parent.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nemo_rl import settings
from nemo_rl.environments.episode_calls import Reply, Request
from nemo_rl.environments.episode_child import SHUTDOWN_S, encode, receive
from nemo_rl.errors import EnvironmentFailure

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class EpisodeProcess:
    """Calls the episodes of an environment in a child process, like `EpisodeHost` in this one. Thread-safe.

    Config, problems and observations cross the pipe as JSON: tuples arrive as lists, and all keys are strings.

    Example:
        >>> process = EpisodeProcess(sys.executable, "operator.eq", {})
        >>> process.submit([Request(0, "reset", {"answer": "4"})])
        >>> process.collect(timeout_s=60)[0].value
        {'messages': None, 'tools': []}
        >>> process.shutdown()

    Args:
        python: Path of the interpreter.
        name: See `EpisodeHost`, as the other arguments.

    Attributes:
        description: The child's `pid`, `executable`, `python` (version) and `venv_digest` (None outside the engine's
            venvs).

    Raises:
        EnvironmentFailure: The child does not start, or cannot load the environment.
    """

    def __init__(self, python: str, name: str, config: Mapping[str, Any], *, concurrency: int = 16) -> None:
        self.name = name
        self._frames: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._unsent: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self._write_lock = threading.Lock()
        self._search_path = tempfile.mkdtemp(prefix="nemo-rl-environment-")
        os.symlink(_PACKAGE, os.path.join(self._search_path, "nemo_rl"))
        start = {"name": name, "config": dict(config), "concurrency": concurrency, "search_path": self._search_path}
        try:
            first_frame = encode(start)
            self._process = subprocess.Popen(
                [python, "-m", "nemo_rl.environments.episode_child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=_child_variables(python, self._search_path),
                start_new_session=True,
            )
        except (OSError, TypeError, ValueError) as error:
            shutil.rmtree(self._search_path, ignore_errors=True)
            raise EnvironmentFailure(f"the process of {name} cannot be started with {python}: {error}") from error
        threading.Thread(target=self._read, name=f"replies of {name}", daemon=True).start()
        self._send(first_frame)
        answer = self._frames.get()
        if answer is None or "failure" in answer:
            reason = self._death() if answer is None else f"{answer['failure']}\n{answer['details']}"
            self.shutdown()
            raise EnvironmentFailure(f"{name} cannot be loaded by {python}: {reason}")
        self.description: dict[str, Any] = answer

    def submit(self, requests: Sequence[Request]) -> None:
        """See `EpisodeHost.submit`. A request that is not JSON data gets a failure as its reply."""
        for request in requests:
            try:
                frame = encode({"requests": [asdict(request)]})
            except (TypeError, ValueError) as error:
                failure = f"the argument of {self.name}.{request.method} is not JSON data: {error}"
                self._unsent.put(Reply(request.episode, None, 0.0, failure))
                self._frames.put({"replies": []})  # wakes `collect`
            else:
                self._send(frame)

    def collect(self, timeout_s: float) -> list[Reply]:
        """See `EpisodeHost.collect`. Raises `EnvironmentFailure` if the child has ended."""
        replies: list[Reply] = []
        with contextlib.suppress(queue.Empty):
            frame = self._frames.get(timeout=timeout_s)
            while True:
                if frame is None:
                    self._frames.put(None)  # for the next call
                    if not replies:
                        raise EnvironmentFailure(self._death())
                    break
                replies += [Reply(**reply) for reply in frame["replies"]]
                frame = self._frames.get_nowait()
        with contextlib.suppress(queue.Empty):
            while True:
                replies.append(self._unsent.get_nowait())
        return replies

    def shutdown(self) -> None:
        """End the child: close its episodes, or kill it with its own children if that takes longer than 5 s."""
        with self._write_lock, contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(SHUTDOWN_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _send(self, frame: bytes) -> None:
        # A child that has ended is reported by `collect`.
        with self._write_lock, contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(frame)  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as pipe, contextlib.suppress(OSError, ValueError):
            while (frame := receive(pipe)) is not None:
                self._frames.put(frame)
        # Not only in `shutdown`: a worker whose child has died is killed.
        shutil.rmtree(self._search_path, ignore_errors=True)
        self._frames.put(None)

    def _death(self) -> str:
        try:
            code = self._process.wait(SHUTDOWN_S)
        except subprocess.TimeoutExpired:
            return f"the process of {self.name} (pid {self._process.pid}) has closed its pipe"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the process of {self.name} (pid {self._process.pid}) {how}"


def _child_variables(python: str, search_path: str) -> dict[str, str]:
    """Return the variables of this process with the venv of `python` and the source directories of this process."""
    variables = {
        name: value for name, value in settings.snapshot().items() if name not in ("PYTHONHOME", "VIRTUAL_ENV")
    }
    root = os.path.dirname(os.path.dirname(python))
    if os.path.exists(os.path.join(root, "pyvenv.cfg")):
        variables["VIRTUAL_ENV"] = root
    variables["PATH"] = os.pathsep.join([os.path.dirname(python), variables.get("PATH", os.defpath)])
    variables["PYTHONPATH"] = os.pathsep.join([search_path, *_source_directories()])
    variables["PYTHONNOUSERSITE"] = "1"
    return variables


def _source_directories() -> list[str]:
    """Return the directories on `sys.path` that belong neither to the standard library nor to installed packages."""
    library = tuple(os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib"))
    directories = [os.path.abspath(entry) for entry in sys.path]
    return [
        directory
        for directory in dict.fromkeys(directories)
        if os.path.isdir(directory)
        and not os.path.join(directory, "").startswith(library)
        and not {"site-packages", "dist-packages"} & {*directory.split(os.sep)}
    ]
