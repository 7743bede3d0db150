"""A template: a process that has imported the packages of one Python, and starts processes by fork.

A warm session runs one template per Python and environment (see `warm_session`). The template runs this file by path in
that Python, which may lack `nemo_rl`; so the file uses the standard library only.

::

    client (setup_worker, or a job's command)          template
    ─────────────────────────────────────────          ────────
    request: arguments, environment, std streams ──►   compare the files of all modules with those imported
                                                       fork; the child takes streams, environment and directory
    process id                                   ◄──
    go                                           ──►   the child runs the worker's script, or the job

A fork copies memory and one thread. So a template refuses to serve if it has threads, has opened a GPU, or has imported
Ray, whose C++ part reads its environment once. Modules that import Ray are left out, and so are packages that use a GPU
or keep threads when they are imported. If a file of an imported module has changed, the template ends, and the client
starts its process the usual way.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.machinery
import io
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

_MAX_REQUEST_BYTES = 4 << 20
_GO = b"g"
_REQUEST_TIMEOUT_S = 10.0
_THREADS = "/proc/self/task"


def main(arguments: list[str]) -> int:
    """Import modules and serve until standard input is closed: SPECIFICATION [MODULE_OR_PACKAGE_TO_LEAVE_OUT ...]."""
    specification, left_out = Path(arguments[0]), arguments[1:]
    wanted: dict[str, Any] = json.loads(specification.read_text(encoding="utf-8"))
    before = dict(os.environ)
    gc.disable()
    unwanted = _import_modules(wanted["modules"], frozenset(left_out))
    if unwanted:
        # A thread cannot be copied, and modules cannot be unloaded: begin again without them.
        os.execve(sys.executable, [sys.executable, __file__, *arguments, *unwanted], before)
    if (reason := _why_unsafe()) is not None:
        _note(f"refused: {reason}")
        return 3
    gc.collect()
    gc.freeze()
    gc.enable()
    # Torch, for one, sets variables when it is imported.
    set_by_imports = {name: value for name, value in os.environ.items() if before.get(name) != value}
    files = _file_states()
    path = wanted["socket"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        # A relative path, because that of a socket has at most 107 bytes. This process runs in the directory.
        server.bind(f"{path}.new")
        server.listen(64)
        inode = os.stat(f"{path}.new").st_ino
        os.rename(f"{path}.new", path)  # replaces the socket of an earlier template
        _note(f"ready: {len(files)} files, without {', '.join(left_out) or 'nothing'}")
        try:
            return _serve(server, files, set_by_imports)
        finally:
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:  # not the socket of a successor
                    os.unlink(path)


def _note(text: str) -> None:
    """Write a line to the template's log. Not with `logging`, whose settings the children would inherit."""
    sys.stdout.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
    sys.stdout.flush()


# --- preparation ------------------------------------------------------------------------------------------------------


class _ImportsRay(BaseException):
    """A module imports Ray. Not an `Exception`: modules that can do without Ray would catch it."""


class _RayGuard:
    """An import hook that raises `_ImportsRay` where a module imports Ray; it may ask whether Ray is installed."""

    def __init__(self) -> None:
        self.num_imports = 0

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == "ray" else None
        if spec is not None:
            spec.loader = self  # type: ignore[assignment]
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Let Python create the module."""

    def exec_module(self, module: Any) -> None:
        self.num_imports += 1
        raise _ImportsRay


def _import_modules(names: list[str], left_out: frozenset[str]) -> list[str]:
    """Import modules. Returns those that import Ray, and packages that use a GPU or start a thread."""
    guard = _RayGuard()
    sys.meta_path.insert(0, guard)  # type: ignore[arg-type]
    try:
        return _import_guarded(names, left_out | {"ray"}, guard)
    finally:
        sys.meta_path.remove(guard)  # type: ignore[arg-type]


def _import_guarded(names: list[str], left_out: frozenset[str], guard: _RayGuard) -> list[str]:
    package_of_thread: dict[str, str] = {}
    threads = set(os.listdir(_THREADS))
    importing_ray: list[str] = []
    for name in names:
        package = name.partition(".")[0]
        if package in left_out or name in left_out or name in sys.modules:
            continue
        before = guard.num_imports
        # A worker may have created the module itself, or an option of the worker is needed to import it.
        with contextlib.suppress(Exception, _ImportsRay):
            importlib.import_module(name)
        if guard.num_imports > before:
            importing_ray.append(name)
            continue
        if _opened_gpu() is not None:
            return [*importing_ray, package]
        new = set(os.listdir(_THREADS)) - threads
        package_of_thread.update(dict.fromkeys(new, package))
        threads |= new
    if importing_ray:
        return importing_ray
    # Libraries that prepare for a fork, such as OpenBLAS, end their threads in it. Others keep them.
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return [package_of_thread[thread] for thread in os.listdir(_THREADS) if thread in package_of_thread][:1]


def _why_unsafe() -> str | None:
    """Return why processes must not be forked from this one, or None."""
    if len(os.listdir(_THREADS)) > 1:
        return "it has several threads"
    device = _opened_gpu()
    return None if device is None else f"it has opened {device}"


def _opened_gpu() -> str | None:
    """Return a device file of a GPU that this process has opened: CUDA cannot be used after a fork."""
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{descriptor}")
            if target.startswith("/dev/nvidia"):
                return target
    return None


def _file_states() -> dict[str, tuple[int, int, int] | None]:
    """Return modification time, size and inode of every imported file and of every directory that is searched."""
    paths = {path for path in sys.path if path}
    for module in list(sys.modules.values()):
        path = getattr(module, "__dict__", {}).get("__file__")
        if isinstance(path, str) and os.path.isabs(path):
            paths.add(path)
    return {path: _state(path) for path in paths}


def _state(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


# --- serving ----------------------------------------------------------------------------------------------------------


def _serve(server: socket.socket, files: dict[str, tuple[int, int, int] | None], set_by_imports: dict[str, str]) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
    while True:
        readable, _, _ = select.select([server, sys.stdin], [], [])
        if sys.stdin in readable:  # the session has ended, or has replaced this template
            return 0
        connection, _ = server.accept()
        with connection:
            connection.settimeout(_REQUEST_TIMEOUT_S)
            try:
                request, descriptors = _receive(connection)
            except (OSError, ValueError) as error:
                _note(f"dropped a request: {error}")
                continue
            changed = next((path for path, state in files.items() if _state(path) != state), None)
            if changed is not None:
                _note(f"ended: {changed} has changed")
                return 0
            request["environment"] = set_by_imports | request["environment"]
            _fork(server, connection, request, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    while not data.endswith(b"\n"):
        more = connection.recv(1 << 16)
        if not more or len(data) > _MAX_REQUEST_BYTES:
            raise ValueError("it is incomplete")
        data += more
    if len(descriptors) != 3:
        raise ValueError(f"it has {len(descriptors)} file descriptors instead of 3")
    return json.loads(data), descriptors


def _fork(server: socket.socket, connection: socket.socket, request: dict[str, Any], descriptors: list[int]) -> None:
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        server.close()
        _become(request, descriptors, connection)
    _note(f"started process {child} in {(time.perf_counter() - started) * 1e3:.0f} ms")
    with contextlib.suppress(OSError):
        connection.sendall(f"{child}\n".encode())


# --- the child --------------------------------------------------------------------------------------------------------


def _become(request: dict[str, Any], descriptors: list[int], connection: socket.socket) -> NoReturn:
    """Turn this child into the process that the client wants."""
    os.setsid()  # Ray kills the process group of a worker that it ends
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    for descriptor in descriptors:
        os.close(descriptor)
    if connection.recv(1) != _GO:
        os._exit(0)  # the client has not waited, and started its process the usual way
    connection.settimeout(None)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.umask(request["umask"])
    _set_signals(frozenset(request["ignored_signals"]), frozenset(request["blocked_signals"]))
    os.chdir(request["directory"])
    time.tzset()
    _open_standard_streams()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # all children would draw the same numbers
    sys.argv[:] = request["arguments"]
    if "script" in request:
        connection.close()
        sys.path[0] = os.path.dirname(request["script"])
        runpy.run_path(request["script"], run_name="__main__")
        sys.exit(0)
    sys.path[0] = request["path"]
    _run_job(request, connection)


def _set_signals(ignored: frozenset[int], blocked: frozenset[int]) -> None:
    """Ignore and block these signals, as a process does that the client executes; `nohup`, for one, ignores SIGHUP."""
    for number in signal.valid_signals():
        if number in ignored:
            signal.signal(number, signal.SIG_IGN)
        elif signal.getsignal(number) is signal.SIG_IGN:  # in the template
            is_interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _open_standard_streams() -> None:
    """Replace Python's standard streams, whose buffering was chosen for the template's files."""
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        raw = io.FileIO(descriptor, "w", closefd=False)
        unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
        buffered = io.BufferedWriter(raw)
        stream = io.TextIOWrapper(
            buffered,
            errors="backslashreplace" if descriptor == 2 else None,
            line_buffering=descriptor == 2 or raw.isatty() or unbuffered,
            write_through=unbuffered,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.__stdin__ = sys.stdin  # type: ignore[misc]


def _run_job(request: dict[str, Any], connection: socket.socket) -> NoReturn:
    """Run the `main` of a job's module; send its exit code, and end with the client."""
    threading.Thread(target=_end_with_client, args=(connection,), daemon=True).start()
    code: int | str | None = 1
    try:
        code = importlib.import_module(request["module"]).main(request["arguments"][1:], program=request["program"])
    except SystemExit as ended:
        code = ended.code
    finally:
        number = code if isinstance(code, int) else int(code is not None)
        with contextlib.suppress(OSError):
            connection.sendall(f"{number}\n".encode())
    sys.exit(code)


def _end_with_client(connection: socket.socket) -> None:
    """Kill this process when the client is killed, as if the client were the process."""
    with contextlib.suppress(OSError):
        connection.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
