"""Starts processes through the templates of a warm session; see `template_process`.

`setup_worker.py` imports this file by its path, without the package. So it uses the standard library only, and reads
`os.environ` instead of using `nemo_rl.settings`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# In the raylet of a warm session: `<directory of the templates>/`. In its workers: `<directory>/<key>`.
TEMPLATE_VARIABLE = "NEMO_RL_TEMPLATE"

# In the directory of the templates: the drivers that use the session hold it, shared.
DRIVERS_LOCK = "drivers.lock"

_ANSWER_TIMEOUT_S = 10.0
_GO = b"g"
# Variables that differ between processes of one kind and that no package reads when it is imported. Ray sets
# PYTHONBREAKPOINT when it is imported.
_PER_PROCESS = frozenset(
    {"RAY_JOB_ID", "RAY_RAYLET_PID", "PYTHONBREAKPOINT", TEMPLATE_VARIABLE} | {"_", "PWD", "OLDPWD", "SHLVL"}
)
_PER_TERMINAL = frozenset({"COLUMNS", "LINES", "WINDOWID", "DISPLAY", "STY", "TTY", "XDG_SESSION_ID", "UV"})
_PER_TERMINAL_PREFIXES = ("SSH_", "TMUX", "TERM", "UV_RUN_")
# Packages that a template must not import: `ray` cannot be forked, and `nemo_rl` needs it.
_NEVER_IMPORTED = frozenset({"ray", "nemo_rl"})


def relevant_variables(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that may change what an import does."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _PER_PROCESS | _PER_TERMINAL and not name.startswith(_PER_TERMINAL_PREFIXES)
    }


@dataclass(frozen=True)
class Template:
    """Names the template for a Python and the environment in which it imports its packages.

    Example::

        template = Template.of(Path("/tmp/session"), sys.executable, dict(os.environ))
        started = template.start({"script": "worker.py", "arguments": ["worker.py"]})  # None: there is no such template
    """

    directory: Path
    key: str
    python: str
    environment: dict[str, str]

    @staticmethod
    def of(directory: Path, python: str, environment: dict[str, str]) -> Template:
        """Return the template for processes that run `python` with this environment."""
        relevant = relevant_variables(environment)
        text = json.dumps([python, sorted(relevant.items())])
        return Template(directory, hashlib.sha256(text.encode()).hexdigest()[:16], python, relevant)

    @property
    def request_path(self) -> Path:
        return self.directory / f"{self.key}.request.json"

    def ask_for(self) -> None:
        """Ask the session to start this template, once it is known what it has to import."""
        if not self.request_path.exists():
            request = {"key": self.key, "python": self.python, "environment": self.environment}
            with contextlib.suppress(OSError):  # the session has just ended
                write_privately(self.request_path, json.dumps(request))

    def start(self, request: dict[str, Any], variables: dict[str, str] | None = None) -> StartedProcess | None:
        """Start a process; None if there is no template, or it does not answer.

        It has the standard streams, the working directory and the environment of this one, and ignores and blocks the
        same signals.

        Args:
            request: what the process runs: `script`, or `module` with `program` and `path`; and `arguments`.
            variables: environment variables that it has in addition.
        """
        umask = os.umask(0)
        os.umask(umask)
        environment = {**os.environ, **(variables or {})}
        request = {
            **request,
            "environment": environment,
            "directory": os.getcwd(),
            "umask": umask,
            "ignored_signals": [
                number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN
            ],
            "blocked_signals": list(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        }
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_ANSWER_TIMEOUT_S)
        try:
            # Through the open directory, because the path of a socket has at most 107 bytes.
            directory = os.open(self.directory, os.O_PATH | os.O_DIRECTORY)
            try:
                connection.connect(f"/proc/self/fd/{directory}/{self.key}.sock")
            finally:
                os.close(directory)
            data = json.dumps(request).encode() + b"\n"
            sent = socket.send_fds(connection, [data], [0, 1, 2])
            connection.sendall(data[sent:])
            answer = connection.makefile("r").readline()
            if not answer:
                raise ConnectionError("the template has ended")
            connection.sendall(_GO)
        except OSError:
            connection.close()
            return None
        connection.settimeout(None)
        return StartedProcess(int(answer), connection)


@dataclass(frozen=True)
class StartedProcess:
    """A process that a template has started; `connection` closes when it ends."""

    pid: int
    connection: socket.socket


def worker_command(python: str, command: list[str]) -> list[str] | None:
    """Start a Ray worker from a template of the session and return None, or return the command that starts it.

    If there is no template, the session is asked for one: later workers of this kind start from it.
    """
    directory = os.path.dirname(os.environ.get(TEMPLATE_VARIABLE, ""))
    if not directory or command[0].startswith("-"):
        return command
    template = Template.of(Path(directory), python, dict(os.environ))
    os.environ[TEMPLATE_VARIABLE] = str(template.directory / template.key)
    command = [str(Path(__file__).with_name("session_worker.py")), *command]
    started = template.start({"script": command[0], "arguments": command})
    if started is None:
        template.ask_for()
        return command
    started.connection.close()
    return None


def report_imports(template: str) -> None:
    """Tell the session what a process of the template `<directory>/<key>` has imported, in the order of the imports.

    Only modules that are installed in its Python count.
    """
    prefix = sys.prefix + os.sep
    names = [
        name
        for name, module in list(sys.modules.items())
        if isinstance(module, types.ModuleType)
        and str(vars(module).get("__file__") or "").startswith(prefix)
        and name.partition(".")[0] not in _NEVER_IMPORTED
    ]
    with contextlib.suppress(OSError):  # the session has ended
        write_privately(Path(f"{template}.{os.getpid()}.modules.json"), json.dumps(names))


def write_privately(path: Path, text: str) -> None:
    """Write a file that only this user can read, and that appears at once with its whole content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)
