"""The tool `python`: runs code of a model in a process that is restricted and ends with the call. See `sandbox`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import time

from nemo_rl.environments.tools import sandbox
from nemo_rl.environments.tools.tool_set import ToolSet
from nemo_rl.errors import ConfigError, EnvironmentFailure

_START_TIMEOUT_S = 120.0
_MAX_OUTPUT_BYTES = 2**16
# Sleeping and waiting for a busy machine are not CPU time, so the clock may run longer.
_WALL_FACTOR = 3.0


class PythonTool(ToolSet):
    """Runs Python code in a process of its own: no network, no other files, limited time and memory.

    Each call starts a new process, so no variables remain. The interpreter is that of the environment, with its
    packages.

    Example:
        >>> print(PythonTool().python("print(sum(range(5)))"), end="")
        10

    Args:
        timeout_s: CPU time of a call, in seconds; a call may take three times as long by the clock.
        memory_limit_mb: Memory that the code may use, in MiB of address space.
        file_limit_mb: Size of one file in the working directory of a call, in MiB. The directory is removed afterwards.
        protect_files: Whether to deny access to all files but the interpreter and the working directory. It needs
            Landlock (Linux 5.13); do without only in a container that holds no files of value.

    Raises:
        ConfigError: A limit is not positive, or this machine cannot restrict a process.
    """

    def __init__(
        self,
        timeout_s: float = 10.0,
        memory_limit_mb: int = 1024,
        file_limit_mb: int = 16,
        protect_files: bool = True,
    ) -> None:
        for name, value in (
            ("timeout_s", timeout_s),
            ("memory_limit_mb", memory_limit_mb),
            ("file_limit_mb", file_limit_mb),
        ):
            if not value > 0:
                raise ConfigError(f"{name} of the tool `python` is {value}; it must be positive")
        if platform.machine() not in sandbox.MACHINES:
            raise ConfigError(f"the tool `python` runs on {' and '.join(sandbox.MACHINES)}, not {platform.machine()}")
        if protect_files and sandbox.landlock_version() < 1:
            raise ConfigError(
                f"the tool `python` cannot keep a model's code away from your files: the kernel ({platform.release()}) "
                "has no Landlock (Linux 5.13, CONFIG_SECURITY_LANDLOCK), or the container forbids it. In a container "
                "that holds no files of value, set protect_files to false."
            )
        self._timeout_s = timeout_s
        self._limits = [math.ceil(timeout_s), memory_limit_mb, file_limit_mb, protect_files]

    def python(self, code: str) -> str:
        """Run Python code and return what it prints. Nothing is kept for the next call, and there is no network.

        Args:
            code: The code. Print what you want to see.
        """
        with tempfile.TemporaryDirectory(prefix="nemo-rl-python-", ignore_cleanup_errors=True) as scratch:
            ready, status = os.pipe()
            with open(ready, "rb") as ready_file:
                try:
                    process = self._start(scratch, status)
                finally:
                    os.close(status)
                try:
                    return self._result(process, code, ready_file.fileno())
                finally:
                    process.kill()
                    for pipe in (process.stdin, process.stdout):
                        assert pipe is not None
                        with contextlib.suppress(OSError):
                            pipe.close()
                    process.wait()

    def _start(self, scratch: str, status: int) -> subprocess.Popen[bytes]:
        # One thread per library: more are denied.
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
        try:
            return subprocess.Popen(
                [sys.executable, "-I", "-B", "-u", sandbox.__file__, json.dumps([status, *self._limits])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=scratch,
                env={"HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8", **threads},
                pass_fds=[status],
                start_new_session=True,
            )
        except OSError as error:
            raise EnvironmentFailure(f"cannot start {sys.executable} for the tool `python`: {error}") from error

    def _result(self, process: subprocess.Popen[bytes], code: str, ready: int) -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(code.encode(errors="replace"))
            process.stdin.close()
        if not _is_readable(ready, _START_TIMEOUT_S):
            raise EnvironmentFailure(f"the tool `python` did not start within {_START_TIMEOUT_S:g} s")
        started = time.monotonic()
        report = os.read(ready, 4096).decode()
        if report != "ready":
            reason = report or _read(process.stdout.fileno(), started + 1.0)[0].decode(errors="replace").strip()
            raise EnvironmentFailure(f"the tool `python` cannot restrict its process: {reason}")
        output, outcome = _read(process.stdout.fileno(), started + _WALL_FACTOR * self._timeout_s)
        if outcome == "ended":
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, started + _WALL_FACTOR * self._timeout_s - time.monotonic()))
        seconds = time.monotonic() - started
        notes = {
            "too long": f"stopped after {_MAX_OUTPUT_BYTES} bytes of output",
            "late": f"stopped after {_WALL_FACTOR * self._timeout_s:g} s",
        }
        note = notes.get(outcome) or self._note(process.returncode, seconds)
        text = output.decode(errors="replace")
        return f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}Error: {note}" if note else text

    def _note(self, status: int | None, seconds: float) -> str:
        """Return why the process ended, for the model; empty if it ended by itself."""
        if status is None:  # it has closed its output and still runs
            return f"stopped after {_WALL_FACTOR * self._timeout_s:g} s"
        if status >= 0:  # 1: there is a traceback
            return "" if status <= 1 else f"exit status {status}"
        if -status == signal.SIGXCPU or (-status == signal.SIGKILL and seconds >= self._limits[0]):
            return f"stopped after {self._limits[0]} s of CPU time"
        if -status == signal.SIGKILL:
            raise EnvironmentFailure(
                "a process of the tool `python` was killed from outside, probably because the machine ran out of "
                f"memory: lower memory_limit_mb ({self._limits[1]}) or the number of concurrent episodes"
            )
        return f"the process crashed ({signal.Signals(-status).name})"


def _read(pipe: int, deadline: float) -> tuple[bytes, str]:
    """Read until the pipe "ended", the output is "too long" or the deadline has passed ("late")."""
    output = b""
    while len(output) <= _MAX_OUTPUT_BYTES:
        if not _is_readable(pipe, deadline - time.monotonic()):
            return output, "late"
        chunk = os.read(pipe, 2**16)
        if not chunk:
            return output, "ended"
        output += chunk
    return output[:_MAX_OUTPUT_BYTES], "too long"


def _is_readable(pipe: int, timeout_s: float) -> bool:
    """Wait until the pipe has data or has ended, at most `timeout_s` seconds; return whether it has."""
    poll = select.poll()  # select() knows only descriptors below 1024
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(max(0.0, 1000 * timeout_s)))
