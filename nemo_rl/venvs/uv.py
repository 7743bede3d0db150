"""Every call of uv, and nothing else of what makes a venv.

uv gets an explicit interpreter and an explicit set of variables. What it prints goes to a log file and, line by
line, to a callback, with secrets masked. What it answers becomes a typed error.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nemo_rl import settings
from nemo_rl.errors import LockMismatchError, NoSpaceError, UvNotFoundError, VenvBuildError, VenvError
from nemo_rl.venvs.masking import mask_secrets

_TAIL_LINES = 25
_PASSED = """
    HOME USER LOGNAME PATH TMPDIR TZ LANG LC_ALL XDG_CACHE_HOME XDG_CONFIG_HOME XDG_CONFIG_DIRS XDG_DATA_HOME NETRC
    HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy
    SSL_CERT_FILE SSL_CERT_DIR SSL_CLIENT_CERT SSH_AUTH_SOCK GIT_SSH_COMMAND
    CC CXX CFLAGS CXXFLAGS LDFLAGS LD_LIBRARY_PATH CUDA_HOME TORCH_CUDA_ARCH_LIST MAX_JOBS
    UV_CACHE_DIR UV_CONFIG_FILE UV_NO_CONFIG UV_OFFLINE UV_LINK_MODE UV_DEFAULT_INDEX UV_INDEX UV_EXTRA_INDEX_URL
    UV_FIND_LINKS UV_NO_INDEX UV_KEYRING_PROVIDER UV_INSECURE_HOST UV_NATIVE_TLS UV_SYSTEM_CERTS UV_HTTP_TIMEOUT
    UV_HTTP_CONNECT_TIMEOUT UV_HTTP_RETRIES UV_CONCURRENT_DOWNLOADS UV_CONCURRENT_BUILDS UV_CONCURRENT_INSTALLS
    UV_PYTHON_INSTALL_DIR UV_EXCLUDE_NEWER UV_RESOLUTION UV_PRERELEASE UV_FORK_STRATEGY
"""
_PASSED_NAMES = frozenset(_PASSED.split())
_PASSED_PREFIXES = ("UV_INDEX_",)  # UV_INDEX_URL, UV_INDEX_STRATEGY and per-index user names and passwords
# A registry that does not answer fails after about (1 + retries) x timeout, rather than whenever a proxy gives up.
_DEFAULTS = {"UV_HTTP_TIMEOUT": "30", "UV_HTTP_RETRIES": "3"}
_FIXED = {"UV_NO_PROGRESS": "1", "NO_COLOR": "1", "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def find_uv() -> str:
    """Path of the uv executable. Raises `UvNotFoundError`."""
    configured = settings.UV.get()
    if configured is not None:
        if shutil.which(configured) is None:
            raise UvNotFoundError(f"{settings.UV.name}={configured!r} is not an executable file.")
        return configured
    # A pip-installed uv stands beside the interpreter, which need not be on PATH. It also comes before a version
    # manager's shim of the same name, which is a script that costs more than uv itself.
    beside = [os.path.dirname(sys.executable), os.path.dirname(os.path.realpath(sys.executable))]
    found = shutil.which("uv", path=settings.snapshot().get("PATH", os.defpath))
    if found is None or _is_script(found):
        found = shutil.which("uv", path=os.pathsep.join(beside)) or found
    if found is None:
        raise UvNotFoundError(
            f"uv was not found on PATH or beside {sys.executable} on {socket.gethostname()}. Install it with "
            f"`pip install uv`, or set {settings.UV.name} to its path."
        )
    return found


def _is_script(path: str) -> bool:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(2) == b"#!"
    return False


def uv_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The whole environment of a call of uv: only listed variables of this process, then `extra`.

    What could send an install elsewhere (UV_PYTHON, VIRTUAL_ENV, UV_PROJECT_ENVIRONMENT, PYTHONPATH, PYTHONHOME,
    CONDA_PREFIX, ...) is not on the list.
    """
    passed = {
        name: value
        for name, value in settings.snapshot().items()
        if name in _PASSED_NAMES or name.startswith(_PASSED_PREFIXES)
    }
    return {**_DEFAULTS, **passed, **_FIXED, **(extra or {})}


@dataclass
class BuildLog:
    """The full output of the commands of one build. A disk that is full never hides uv's own error."""

    path: Path
    _file: IO[str] | None = None

    def write(self, line: str) -> None:
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(line + "\n")
            self._file.flush()
        except OSError:
            self.close()

    def discard(self) -> None:
        """Remove a log that nobody will look for."""
        self.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

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
    timeout_s: float | None = None,
) -> str:
    """Run `uv <arguments>` and return its standard output.

    uv dies with this process, however that ends. Raises `LockMismatchError`, `NoSpaceError`, `UvNotFoundError` or
    `VenvBuildError` (which carries node, command, last lines of output and the log's path); `what` says in the message
    what could not be done.
    """
    command = [find_uv(), *arguments]
    return run_command(
        command, what=what, cwd=cwd, env=uv_environment(extra_env), log=log, on_line=on_line, timeout_s=timeout_s
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
    """`run_uv` for any command of a build."""
    timeout_s = settings.VENV_BUILD_TIMEOUT_S.get() if timeout_s is None else timeout_s
    what, shown = mask_secrets(what), mask_secrets(shlex.join(command))
    tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)

    def take(line: str) -> None:
        line = mask_secrets(line.rstrip())
        tail.append(line)
        if log is not None:
            log.write(line)
        if on_line is not None:
            on_line(line)

    if log is not None:
        log.write(f"$ {shown}")
    with _started(command, what=what, cwd=cwd, env=env) as process:
        output, timed_out = _communicate(process, take, timeout_s)
    if timed_out:
        tail.append(f"killed: it took longer than {timeout_s:.0f} s ({settings.VENV_BUILD_TIMEOUT_S.name})")
    if process.returncode != 0 or timed_out:
        raise _error(what, shown, process.returncode, "\n".join(tail), log)
    return output


@contextlib.contextmanager
def _started(
    command: Sequence[str], *, what: str, cwd: str | Path | None, env: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    parent, kill = os.getpid(), int(signal.SIGKILL)

    def die_with_parent() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, kill)
        if os.getppid() != parent:  # it died before the call above
            os._exit(1)

    try:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        if cwd is not None and not Path(cwd).is_dir():
            raise VenvError(f"{what}: the directory {cwd} does not exist on {socket.gethostname()}.") from None
        raise UvNotFoundError(f"{what}: {command[0]} cannot be started: {error}.") from None
    try:
        yield process
    finally:
        if process.poll() is None:  # such as on Ctrl-C: build back ends and compilers end too
            _kill_group(process)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _communicate(process: subprocess.Popen[str], take: Callable[[str], None], timeout_s: float) -> tuple[str, bool]:
    """Feed lines of standard error to `take`; return standard output and whether the time-out struck."""
    output: list[str] = []

    def read_output() -> None:
        assert process.stdout is not None
        output.append(process.stdout.read())

    struck = threading.Event()

    def strike() -> None:
        struck.set()
        _kill_group(process)

    reader = threading.Thread(target=read_output, daemon=True)
    timer = threading.Timer(timeout_s, strike)
    timer.daemon = True
    reader.start()
    timer.start()
    try:
        assert process.stderr is not None
        for line in process.stderr:
            take(line)
        process.wait()
        reader.join()
    finally:
        timer.cancel()
    return "".join(output), struck.is_set()


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
    return VenvBuildError(
        f"{what} failed on {node} with exit code {code}.\ncommand: {command}\n{tail}{log_line}", **fields
    )


def no_space_error(
    what: str, *, node: str = "", command: str = "", output_tail: str = "", log_path: str = ""
) -> NoSpaceError:
    """The error for a full disk, from uv's or from our own writing."""
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
    """Whether an `OSError` says that a disk or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
