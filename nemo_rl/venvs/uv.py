"""Run uv and the other commands of a build.

uv receives an explicit interpreter and an explicit set of environment variables. Its output goes to a log file and,
line by line, to a callback, with secrets masked. A failure becomes a typed error.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nemo_rl import settings
from nemo_rl.errors import (
    DamagedCacheError,
    LockMismatchError,
    NoSpaceError,
    UvNotFoundError,
    VenvBuildError,
    VenvError,
)
from nemo_rl.secrets import mask_secrets
from nemo_rl.venvs.storage.verify import remedy

_TAIL_LINES = 25
# What uv says about a package that it cannot install from its cache, or whose cache entry it cannot read.
_NOT_INSTALLED = re.compile(r"Failed to install: \S+ \(([\w.-]+)")
_NOT_READ = re.compile(r"Failed to \w+ `([\w.-]+)[^`]*`\s+cause: Failed to deserialize cache entry")
_PASSED = """
    HOME USER LOGNAME PATH TMPDIR TZ LANG LC_ALL XDG_CACHE_HOME XDG_CONFIG_HOME XDG_CONFIG_DIRS XDG_DATA_HOME NETRC
    HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy
    SSL_CERT_FILE SSL_CERT_DIR SSL_CLIENT_CERT SSH_AUTH_SOCK GIT_SSH_COMMAND
    LD_LIBRARY_PATH
    UV_CACHE_DIR UV_CONFIG_FILE UV_NO_CONFIG UV_OFFLINE UV_LINK_MODE UV_DEFAULT_INDEX UV_INDEX UV_EXTRA_INDEX_URL
    UV_FIND_LINKS UV_NO_INDEX UV_KEYRING_PROVIDER UV_INSECURE_HOST UV_NATIVE_TLS UV_SYSTEM_CERTS UV_HTTP_TIMEOUT
    UV_HTTP_CONNECT_TIMEOUT UV_HTTP_RETRIES UV_CONCURRENT_DOWNLOADS UV_CONCURRENT_BUILDS UV_CONCURRENT_INSTALLS
    UV_PYTHON_INSTALL_DIR UV_EXCLUDE_NEWER UV_RESOLUTION UV_PRERELEASE UV_FORK_STRATEGY
"""
_PASSED_NAMES = frozenset(_PASSED.split())
_PASSED_PREFIXES = ("UV_INDEX_",)  # UV_INDEX_URL, UV_INDEX_STRATEGY and per-index user names and passwords
# An index that does not answer fails after about (1 + retries) x timeout, not when a proxy gives up.
_DEFAULTS = {"UV_HTTP_TIMEOUT": "30", "UV_HTTP_RETRIES": "3"}
_FIXED = {"UV_NO_PROGRESS": "1", "NO_COLOR": "1", "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
# Both run the command as a child and kill their process group, which has the build back ends and compilers of uv too,
# when the kernel tells them that the parent (the first argument) has ended. A `preexec_fn` could ask the kernel to kill
# uv, but not what uv has started, and may deadlock in a process with threads. util-linux's `setpriv` takes 2 ms, Python
# 10 ms.
_SETPRIV = ("setpriv", "--pdeathsig", "TERM", "/bin/sh", "-c")
_RUN_IN_SHELL = 'trap "kill -KILL 0" TERM; [ "$PPID" = "$0" ] || exit 1; "$@" & wait $!'
_RUN_IN_PYTHON = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has ended")
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
sys.exit(code if code >= 0 else 128 - code)
"""


def find_uv() -> str:
    """Return the path of the uv executable. Raises `UvNotFoundError`."""
    configured = settings.UV.get()
    if configured is not None:
        if shutil.which(configured) is None:
            raise UvNotFoundError(f"{settings.UV.name}={configured!r} is not an executable file.")
        return configured
    # pip installs uv beside the interpreter, which may not be on PATH. That uv also comes before a version manager's
    # shim on PATH: the shim is a script that takes longer than uv itself.
    beside = [os.path.dirname(sys.executable), os.path.dirname(os.path.realpath(sys.executable))]
    path = shutil.which("uv", path=settings.snapshot().get("PATH", os.defpath))
    if path is None or _is_script(path):
        path = shutil.which("uv", path=os.pathsep.join(beside)) or path
    if path is None:
        raise UvNotFoundError(
            f"uv was not found on PATH or beside {sys.executable} on {socket.gethostname()}. Install it with "
            f"`pip install uv`, or set {settings.UV.name} to its path."
        )
    return path


def _is_script(path: str) -> bool:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(2) == b"#!"
    return False


def uv_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the complete environment for a call of uv: allowed variables of this process, then `extra`.

    Variables that could redirect an install (UV_PYTHON, VIRTUAL_ENV, UV_PROJECT_ENVIRONMENT, PYTHONPATH, PYTHONHOME,
    CONDA_PREFIX, ...) are not allowed, nor are those that change what a build produces: see `build_variables`.
    """
    passed = {
        name: value
        for name, value in settings.snapshot().items()
        if name in _PASSED_NAMES or name.startswith(_PASSED_PREFIXES)
    }
    return {**_DEFAULTS, **passed, **_FIXED, **(extra or {})}


@dataclass
class BuildLog:
    """The log file of one build: the full output of its commands. A full disk stops the log, not the build.

    Attributes:
        path: the file; created with its directory by the first line.
        only_on_failure: whether the context manager removes the file when its block succeeds.
    """

    path: Path
    only_on_failure: bool = False
    _file: IO[str] | None = None

    def __enter__(self) -> BuildLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if self.only_on_failure and kind is None:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def write(self, line: str) -> None:
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(line + "\n")
            self._file.flush()
        except OSError:
            self.close()

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def run_uv(
    arguments: Sequence[str],
    *,
    what: str,
    cwd: str | Path | None = None,
    extra_env: Mapping[str, str] | None = None,
    log: BuildLog | None = None,
    on_line: Callable[[str], None] | None = None,
) -> str:
    """Run `uv <arguments>` and return its standard output.

    uv ends with this process, even if this process is killed.

    Args:
        what: the operation, for error messages, such as "Building the venv 'a'".
        extra_env: variables in addition to `uv_environment()`.
        log: receives the command and its standard error.
        on_line: called with each line of standard error.

    Raises:
        DamagedCacheError: uv cannot install a package from its cache.
        LockMismatchError: `uv.lock` does not match `pyproject.toml`.
        NoSpaceError: a disk is full.
        UvNotFoundError: uv is not installed.
        VenvBuildError: uv failed; carries node, command, last lines of output and path of the log.
    """
    return run_command(
        [find_uv(), *arguments], what=what, cwd=cwd, env=uv_environment(extra_env), log=log, on_line=on_line
    )


def run_command(
    command: Sequence[str],
    *,
    what: str,
    env: Mapping[str, str],
    cwd: str | Path | None = None,
    log: BuildLog | None = None,
    on_line: Callable[[str], None] | None = None,
    timeout_s: float | None = None,
) -> str:
    """Run any command of a build, with the complete environment `env`; see `run_uv`.

    The command is killed after `timeout_s` seconds (default: `NEMO_RL_VENV_BUILD_TIMEOUT_S`).
    """
    timeout_s = settings.VENV_BUILD_TIMEOUT_S.get() if timeout_s is None else timeout_s
    what, shown = mask_secrets(what), mask_secrets(shlex.join(command))
    tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)

    def handle(line: str) -> None:
        line = mask_secrets(line.rstrip())
        tail.append(line)
        if log is not None:
            log.write(line)
        if on_line is not None:
            on_line(line)

    if cwd is not None and not Path(cwd).is_dir():
        raise VenvError(f"{what}: the directory {cwd} does not exist on {socket.gethostname()}.")
    executable = shutil.which(command[0], path=env.get("PATH", os.defpath))
    if executable is None:
        raise UvNotFoundError(f"{what}: {command[0]} is not an executable file on {socket.gethostname()}.")
    process = subprocess.Popen(
        [*_ending_with_parent(), str(os.getpid()), executable, *command[1:]],
        cwd=cwd,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    if log is not None:
        log.write(f"$ {shown}")
    try:
        output, timed_out = _communicate(process, handle, timeout_s)
    finally:
        if process.poll() is None:  # such as on Ctrl-C: end build back ends and compilers too
            _kill_group(process)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    if timed_out:
        tail.append(f"killed: it took longer than {timeout_s:.0f} s ({settings.VENV_BUILD_TIMEOUT_S.name})")
    if process.returncode != 0 or timed_out:
        raise _error(what, shown, process.returncode, "\n".join(tail), log)
    return output


@functools.cache
def _ending_with_parent() -> Sequence[str]:
    """Return the command that runs another one until the parent ends; its arguments: the parent's pid, the command."""
    setpriv = shutil.which(_SETPRIV[0])
    if setpriv is not None:
        command = [setpriv, *_SETPRIV[1:], _RUN_IN_SHELL]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            probe = [*command, str(os.getpid()), "/bin/sh", "-c", "echo works"]
            done = subprocess.run(probe, capture_output=True, timeout=10, check=False, start_new_session=True)
            if done.stdout == b"works\n":
                return command
    return [sys.executable, "-I", "-S", "-c", _RUN_IN_PYTHON]


def _kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _communicate(process: subprocess.Popen[str], handle: Callable[[str], None], timeout_s: float) -> tuple[str, bool]:
    """Pass each line of standard error to `handle`; return standard output and whether the command timed out."""
    output: list[str] = []

    def read_output() -> None:
        assert process.stdout is not None
        output.append(process.stdout.read())

    timed_out = threading.Event()

    def kill() -> None:
        timed_out.set()
        _kill_group(process)

    reader = threading.Thread(target=read_output, daemon=True)
    timer = threading.Timer(timeout_s, kill)
    timer.daemon = True
    reader.start()
    timer.start()
    try:
        assert process.stderr is not None
        for line in process.stderr:
            handle(line)
        process.wait()
        reader.join()
    finally:
        timer.cancel()
    return "".join(output), timed_out.is_set()


def _error(what: str, command: str, code: int, tail: str, log: BuildLog | None) -> VenvError:
    node = socket.gethostname()
    if "needs to be updated, but `--locked`" in tail or "Unable to find lockfile" in tail:
        return LockMismatchError(
            f"{what} on {node}: uv.lock does not match pyproject.toml. Run `uv lock` in the project and commit the "
            f"result.\n{tail}\ncommand: {command}"
        )
    path = str(log.path) if log is not None and os.path.exists(log.path) else ""
    log_line = f"\nfull log: {path}" if path else ""
    fields = {"node": node, "command": command, "output_tail": tail, "log_path": path}
    if "No space left on device" in tail or "os error 28" in tail:
        return no_space_error(what, **fields)
    package = _NOT_INSTALLED.search(tail) or _NOT_READ.search(tail)
    if package is not None:
        return DamagedCacheError(
            f"{what} failed on {node}: uv cannot install {package[1]} from its cache, which may be damaged. "
            f"{remedy([package[1]], 'build again')}\ncommand: {command}\n{tail}{log_line}",
            **fields,
        )
    return VenvBuildError(
        f"{what} failed on {node} with exit code {code}.\ncommand: {command}\n{tail}{log_line}", **fields
    )


def no_space_error(
    what: str, *, node: str = "", command: str = "", output_tail: str = "", log_path: str = ""
) -> NoSpaceError:
    """Return the error for a full disk."""
    return NoSpaceError(
        f"{what}: no space left on {node or socket.gethostname()}. Free space where the venvs "
        f"({settings.VENV_DIR.name}), uv's cache (UV_CACHE_DIR) and temporary files (TMPDIR) are, for instance with "
        f"`nemo-rl venvs prune` and `uv cache prune`.\ncommand: {command}\n{output_tail}",
        node=node or socket.gethostname(),
        command=command,
        output_tail=output_tail,
        log_path=log_path,
    )


def is_no_space(error: OSError) -> bool:
    """Return whether an `OSError` means that a disk or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
