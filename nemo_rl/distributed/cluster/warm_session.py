"""A warm session: a local Ray cluster and templates that outlive jobs, so that the next job starts in seconds.

::

    nemo-rl session start ──► session process ── starts ──► Ray, whose raylet knows the templates' directory
                                    │
       a job's first worker ── request, list of imports ──► directory ◄── reads once a second
                                    │
                                    └── starts ──► a template per Python and environment (`template_process`)

    the next job ── hands over ──► template of the driver ── fork ──► driver ── joins ──► Ray
                                   template of the workers ◄── setup_worker ◄── raylet
                                          └── fork ──► worker

The first job of a session starts as always, and shows what to import. A template imports only packages that are
installed in its Python; every process imports the code of the job and of `nemo_rl` itself. A process that a
template starts has the environment, the working directory and the standard streams that it would have without.

The session ends when no driver has used it for a while, or with `nemo-rl session stop`. A driver uses it only if it
would itself start the same processes: same interpreter, GPUs, working directory, inherited variables, CPUs and limits.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_rl.distributed.cluster import template_process
from nemo_rl.distributed.cluster.local_clusters import LocalCluster, read_record, record_path
from nemo_rl.distributed.cluster.template_client import DRIVERS_LOCK
from nemo_rl.errors import ClusterError
from nemo_rl.utils.files import write_atomically
from nemo_rl.utils.processes import ProcessIdentity

logger = logging.getLogger(__name__)

_POLL_S = 1.0
# While a job runs, a template waits until the job's workers have imported nothing new for this time.
_QUIET_S = 20.0
_REBUILD_AFTER_S = 60.0
_MAX_TEMPLATES = 8
_END_TIMEOUT_S = 2.0
_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 60.0
_LOG = "session.log"


@dataclass(frozen=True)
class SessionState:
    """Describes the running session.

    Attributes:
        process: the session's process.
        directory: its directory, with its log and those of the templates.
        address: of Ray.
        started: seconds since the epoch.
        idle_s: seconds without a driver after which it ends.
        templates: process ids of the templates, by their key.
    """

    process: ProcessIdentity
    directory: Path
    address: str
    started: float
    idle_s: float
    templates: dict[str, int] = field(default_factory=dict)

    @property
    def has_drivers(self) -> bool:
        """Whether a driver uses the session now."""
        return not _is_free(self.directory)


def find_session() -> SessionState | None:
    """Return the session that this interpreter's drivers would find, or None."""
    cluster = read_record(record_path())
    if cluster is None or cluster.session is None:
        return None
    directory = Path(cluster.session.templates)
    try:
        fields: dict[str, Any] = json.loads((directory / "session.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # it is just starting or ending
    return SessionState(cluster.owner, directory, cluster.address, **fields)


def start_session(idle_minutes: float) -> SessionState:
    """Start a session in a process of its own, wait until drivers can join it, and return it.

    A session that is already running is returned as it is.

    Raises:
        ClusterError: it did not start; the message has the end of its log.
    """
    running = find_session()
    if running is not None:
        return running
    directory = record_path().with_suffix(".session")
    directory.mkdir(mode=0o700, exist_ok=True)
    log_path = directory / _LOG
    with open(log_path, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(directory), str(idle_minutes * 60)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        state = find_session()
        if state is not None:
            return state
        time.sleep(0.1)
    process.terminate()
    tail = log_path.read_text(encoding="utf-8", errors="replace")[-2000:].strip()
    raise ClusterError(f"the warm session did not start. Its log ({log_path}) ends with:\n{tail}")


def stop_session(session: SessionState) -> None:
    """End a session, its cluster and its templates. Raises `ClusterError` if it does not end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(session.process.pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while session.process.is_running():
        if time.monotonic() > deadline:
            raise ClusterError(
                f"the warm session (process {session.process.pid}) did not end in {_STOP_TIMEOUT_S:.0f} s"
            )
        time.sleep(0.05)


# --- the session's process --------------------------------------------------------------------------------------------


@dataclass
class _RunningTemplate:
    """A template's process. Closing its standard input ends it."""

    process: subprocess.Popen[bytes]
    modules: tuple[str, ...]
    started: float

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


@dataclass
class TemplateKeeper:
    """Starts, replaces and ends the templates that the processes of jobs have asked for.

    Example::

        keeper = TemplateKeeper(Path("/tmp/session"))
        keeper.update(quiet_s=1.0)  # once a second
        keeper.close()
    """

    directory: Path
    _running: dict[str, _RunningTemplate] = field(default_factory=dict)
    _ending: list[_RunningTemplate] = field(default_factory=list)
    _refused: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def update(self, *, quiet_s: float) -> None:
        """Start templates whose lists of modules have not changed for `quiet_s`; forget those that have ended."""
        self._ending = [template for template in self._ending if template.process.poll() is None]
        for key, template in list(self._running.items()):
            code = template.process.poll()
            if code is not None:
                logger.info("the template %s has ended with code %d", key, code)
                del self._running[key]
                if code != 0:
                    self._refused[key] = template.modules
        for path in sorted(self.directory.glob("*.request.json")):
            key = path.name.partition(".")[0]
            modules = self._modules(key, quiet_s)
            if modules and self._is_due(key, modules):
                self._start(key, json.loads(path.read_text(encoding="utf-8")), modules)

    def process_ids(self) -> dict[str, int]:
        """Return the process id of each running template, by its key."""
        return {key: template.process.pid for key, template in self._running.items()}

    def close(self) -> None:
        """End all templates and wait for them."""
        for key in list(self._running):
            self._end(key)
        for template in self._ending:
            try:
                template.process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:  # it is importing
                template.process.kill()
                template.process.wait()
        self._ending.clear()

    def _modules(self, key: str, quiet_s: float) -> tuple[str, ...]:
        """Return the modules that processes of this template have imported; none if the lists have just changed."""
        paths = sorted(self.directory.glob(f"{key}.*.modules.json"))
        if not paths or time.time() - max(path.stat().st_mtime for path in paths) < quiet_s:
            return ()
        return tuple(dict.fromkeys(name for path in paths for name in json.loads(path.read_text(encoding="utf-8"))))

    def _is_due(self, key: str, modules: tuple[str, ...]) -> bool:
        if set(modules) <= set(self._refused.get(key, ())):
            return False
        running = self._running.get(key)
        if running is None:
            return True
        is_old = time.monotonic() - running.started > _REBUILD_AFTER_S
        return is_old and not set(modules) <= set(running.modules)

    def _start(self, key: str, request: dict[str, Any], modules: tuple[str, ...]) -> None:
        if not os.path.isfile(request["python"]):
            self._refused[key] = modules  # the venv has been removed
            return
        if key in self._running:
            self._end(key)  # its successor replaces the socket when it is ready
        while len(self._running) >= _MAX_TEMPLATES:
            self._end(min(self._running, key=lambda name: self._running[name].started))
        specification = self.directory / f"{key}.template.json"
        content = {"modules": modules, "socket": f"{key}.sock"}
        write_atomically(specification, json.dumps(content), private=True, durable=False)
        with open(self.directory / f"{key}.log", "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [request["python"], template_process.__file__, str(specification)],
                env=request["environment"],
                cwd=self.directory,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._running[key] = _RunningTemplate(process, modules, time.monotonic())
        logger.info("the template %s imports %d modules for %s", key, len(modules), request["python"])

    def _end(self, key: str) -> None:
        """Ask a template to end, which it does when it has served the request that it is serving."""
        template = self._running.pop(key)
        template.end()
        self._ending.append(template)


def _is_free(directory: Path) -> bool:
    """Whether no driver uses the session."""
    with open(directory / DRIVERS_LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@contextlib.contextmanager
def _cleared(directory: Path) -> Iterator[None]:
    """Empty the directory before and remove it after; the log stays until the session ends."""
    for path in directory.iterdir():
        if path.name != _LOG:
            path.unlink()
    try:
        yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _only_session(directory: Path) -> Iterator[None]:
    """Hold the lock of the session's directory. Raises `ClusterError` if another process holds it."""
    with open(directory.with_suffix(".session-lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError("another warm session is starting or ending: try again") from None
        yield


def main(arguments: list[str]) -> int:
    """Run a session until it is idle or stopped: DIRECTORY IDLE_SECONDS."""
    from nemo_rl.distributed.cluster import session

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    directory, idle_s = Path(arguments[0]), float(arguments[1])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _only_session(directory), _cleared(directory), contextlib.suppress(KeyboardInterrupt):
        _keep(directory, idle_s, session.start_session_cluster(directory))
    return 0


def _keep(directory: Path, idle_s: float, cluster: LocalCluster) -> None:
    started = time.time()
    last_used = time.monotonic()
    keeper = TemplateKeeper(directory)
    shown: dict[str, int] | None = None
    try:
        while cluster.gcs.is_running() and time.monotonic() - last_used < idle_s:
            is_free = _is_free(directory)
            if not is_free:
                last_used = time.monotonic()
            keeper.update(quiet_s=_POLL_S if is_free else _QUIET_S)
            if keeper.process_ids() != shown:
                shown = keeper.process_ids()
                content = {"started": started, "idle_s": idle_s, "templates": shown}
                write_atomically(directory / "session.json", json.dumps(content), durable=False)
            time.sleep(_POLL_S)
    finally:
        keeper.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
