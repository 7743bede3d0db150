"""Joining the Ray cluster a job runs on, or starting a local one.

::

    init_ray ──RAY_ADDRESS=host:port─────────────► join it
             ──RAY_ADDRESS=local─────────────────► start one that nobody else joins
             ──unset──► lock ─► record, alive? ──► join it
                              └─► else ──────────► start one, publish its record

A local cluster's record is a file per user, machine, interpreter and set of GPUs in the temporary directory. It names
the GCS process; a record whose process is gone means nothing. So a driver joins the cluster of a running driver of this
project that sees the same GPUs, and never anybody else's. The cluster ends with the driver that started it.

Everything that reaches into Ray's private modules to do this is in this file (checked with ray 2.60).
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import ray
from ray._private import ray_constants
from ray._private.node import Node
from ray._raylet import Config  # type: ignore[attr-defined]

from nemo_rl import settings
from nemo_rl.errors import ClusterError
from nemo_rl.utils.files import write_atomically

logger = logging.getLogger(__name__)

# What a local cluster is started with, unless the user has set the variable. On two idle cores `ray.init` takes about
# 4.2 s with Ray's defaults and 2.3 s with these (it looks for its own node once a second, hence the step).
LOCAL_RAY_VARIABLES = {
    # Nothing scrapes a local cluster's metrics; collecting them costs CPU time in every Ray process.
    "RAY_enable_metrics_collection": "0",
    # Ray would start one process of the driver's Python per core and make the driver wait for them.
    # Almost all of our workers run in another Python, and would find the cores busy.
    "RAY_prestart_worker_first_driver": "0",
}

# A socket's path has at most 107 bytes; Ray adds `/ray/session_<time>_<pid>/sockets/plasma_store`.
_MAX_TEMP_DIR_BYTES = 107 - 72

_KNOCK_TIMEOUT_S = 5.0

_process_lock = threading.Lock()


def init_ray(log_dir: str | None = None) -> None:
    """Connect this process to Ray: `RAY_ADDRESS`, or this project's running local cluster, or a new local one.

    A second call in the same process changes nothing. No working directory is shipped, Ray's own `uv run` hook is off,
    and a cluster started here listens on the loopback interface only, with token authentication, and has no dashboard
    (`NEMO_RL_RAY_DASHBOARD=1` starts it).

    Args:
        log_dir: where to leave a symbolic link `ray` to Ray's session directory, which holds the logs of every worker.

    Raises:
        ClusterError: the cluster named by `RAY_ADDRESS` cannot be joined.
    """
    with _process_lock:
        if not ray.is_initialized():
            _connect()
    if log_dir is not None:
        _link_session(Path(log_dir))


def start_local_ray(num_cpus: int | None = None, num_gpus: int | None = None) -> str:
    """Start a local cluster that no other driver joins, connect to it, and return its address.

    For tests and benchmarks; `num_cpus` and `num_gpus` may claim more than the machine has.
    """
    with _process_lock:
        return _start_local(num_cpus, num_gpus)


def can_grow() -> bool:
    """Whether more nodes may still join: false for a local cluster, which has one node for ever."""
    return not _node().ray_init_cluster and _joined_local_cluster is None


def job_name() -> str:
    """This driver's job, by a name that no job of another cluster has."""
    return f"{_node().session_name}/{ray.get_runtime_context().get_job_id()}"


def _connect() -> None:
    address = settings.RAY_ADDRESS.get()
    if address == "local":
        _start_local()
    elif address is not None:
        _join(address)
    else:
        with _local_cluster_lock() as record_path:
            running = _read_record(record_path)
            if running is None or not _join_local(running):
                _start_local()
                _write_record(record_path)


# --- joining ------------------------------------------------------------------------------------------------

_joined_local_cluster: _LocalCluster | None = None


def _join(address: str) -> None:
    global _joined_local_cluster
    _disable_uv_run_hook()
    _keep_loopback_addresses()
    try:
        _knock(address)
        ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"cannot join the Ray cluster at RAY_ADDRESS={address}: {error}. Check that it runs and can be reached. "
            "If it was started with token authentication, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to its token "
            "(`ray get-auth-token` on the head node). RAY_ADDRESS=local starts a local cluster instead."
        ) from error
    _joined_local_cluster = None
    logger.info("joined the Ray cluster at %s", address)


def _knock(address: str) -> None:
    """Raise `OSError` if nobody listens at `host:port`. Ray itself would end this process, without an exception."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "://" in address:
        return  # `auto`, or a client's address
    deadline = time.monotonic() + _KNOCK_TIMEOUT_S  # a head node may be about to start
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_TIMEOUT_S).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _join_local(cluster: _LocalCluster) -> bool:
    """Join another driver's local cluster; false if it ended in the meantime."""
    global _joined_local_cluster
    _disable_uv_run_hook()
    _keep_loopback_addresses()
    if cluster.auth_mode is not None:
        # Ray looks for a token by itself only where it looks for the cluster by itself.
        settings.export({"RAY_AUTH_MODE": cluster.auth_mode})
        Config.initialize("")
    try:
        ray.init(address=cluster.address, logging_level=logging.WARNING)
    except (ConnectionError, ray.exceptions.RayError) as error:
        logger.info("the local Ray cluster at %s cannot be joined any more: %s", cluster.address, error)
        return False
    _joined_local_cluster = cluster
    logger.warning(
        "joined the local Ray cluster of process %d, which sees the same GPUs; it ends when that process ends. "
        "RAY_ADDRESS=local starts a cluster of your own.",
        cluster.owner.pid,
    )
    return True


# --- starting -----------------------------------------------------------------------------------------------


def _start_local(num_cpus: int | None = None, num_gpus: int | None = None) -> str:
    global _joined_local_cluster
    _disable_uv_run_hook()
    _keep_loopback_addresses()
    settings.export({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"})  # for Ray's own processes
    environment = settings.snapshot()
    settings.export({name: value for name, value in LOCAL_RAY_VARIABLES.items() if name not in environment})
    _ensure_auth_token(environment)
    # Ray's own script costs every worker the CPU time of one more `import ray`; see setup_worker.py.
    ray_constants.SETUP_WORKER_FILENAME = str(Path(__file__).with_name("setup_worker.py"))
    # Ray warns at every start that token authentication is on, which is what we want.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    try:
        with settings.only_inheritable():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=settings.RAY_DASHBOARD.get(),
                logging_level=logging.WARNING,
                _temp_dir=_short_temp_dir(environment),
            )
    except Exception as error:  # Ray raises plain `Exception` for a node that does not come up
        raise ClusterError(
            f"a local Ray cluster cannot be started: {error} Ray's own logs are in its session directory "
            "(`logs/raylet.out`, `logs/gcs_server.out`); a machine that is very busy is a common cause."
        ) from error
    _joined_local_cluster = None
    node = _node()
    logger.info("started a local Ray cluster at %s; dashboard: %s", node.gcs_address, node.webui_url or "off")
    return node.gcs_address


def _node() -> Node:
    node = ray._private.worker._global_node
    assert node is not None, "not connected to Ray"
    return node


def _ensure_auth_token(environment: Mapping[str, str]) -> None:
    """Make a token where Ray would fail to: it keeps one in the home directory, which may be read-only."""
    if environment.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        return
    home, writable = settings.home_dir(), False
    if home is not None:
        token_path = home / ".ray" / "auth_token"
        with contextlib.suppress(OSError):
            token_path.parent.mkdir(parents=True, exist_ok=True)
            writable = token_path.exists() or os.access(token_path.parent, os.W_OK)
    if not writable:
        settings.export({"RAY_AUTH_TOKEN": secrets.token_hex(32)})


def _short_temp_dir(environment: Mapping[str, str]) -> str | None:
    """A directory for Ray's session where `TMPDIR` is too deep for the paths of its sockets; else None, its default."""
    default = environment.get("RAY_TMPDIR") or environment.get("TMPDIR", "/tmp")
    return "/tmp/ray" if len(os.fsencode(default)) > _MAX_TEMP_DIR_BYTES else None


def _disable_uv_run_hook() -> None:
    """Keep Ray from shipping the directory of a driver started by `uv run` and running every worker with `uv run`."""
    settings.export({"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"})  # for child processes
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False  # Ray has read the variable when it was imported


def _keep_loopback_addresses() -> None:
    """Let Ray take 127.0.0.1 for what it is, as it does on a laptop's other operating systems.

    Otherwise it replaces the address, given or found, by one that other machines can reach. A local cluster has no use
    for that: on loopback no port of it can be reached from outside, and it survives a change of network. Clusters with
    other addresses are joined as before. Ray offers this through a variable, `RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER`, that
    it reads when it is imported.
    """
    ray_constants.ENABLE_RAY_CLUSTER = False


# --- the record of a local cluster --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Process:
    """A process, told apart from a later one with the same id."""

    pid: int
    created: float

    @staticmethod
    def of(pid: int) -> _Process:
        return _Process(pid, psutil.Process(pid).create_time())

    def is_running(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.created and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


@dataclass(frozen=True)
class _LocalCluster:
    """A local cluster as its owner published it.

    Attributes:
        address: host and port of the GCS.
        owner: the driver that started it; the cluster ends with it.
        gcs: the cluster's central process.
        auth_mode: Ray's authentication mode, None for Ray's default.
        ray_version: of the owner; Ray refuses to mix versions.
    """

    address: str
    owner: _Process
    gcs: _Process
    auth_mode: str | None
    ray_version: str

    @staticmethod
    def from_json(text: str) -> _LocalCluster:
        fields = json.loads(text)
        return _LocalCluster(**{**fields, "owner": _Process(**fields["owner"]), "gcs": _Process(**fields["gcs"])})

    def can_be_joined(self) -> bool:
        # Both: a dead owner's GCS lives a moment longer, and a driver may go on after it shut its cluster down.
        # Ray ends a driver that connects to a dying GCS, without an exception.
        return self.ray_version == ray.__version__ and self.owner.is_running() and self.gcs.is_running()


@contextlib.contextmanager
def _local_cluster_lock() -> Iterator[Path]:
    """Hold the lock of this user's local cluster for these GPUs, so that two drivers started together share one."""
    directory = Path(tempfile.gettempdir()) / f"nemo_rl-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ClusterError(
            f"{directory} can be written by somebody else, so its records of running Ray clusters cannot be trusted. "
            "Remove it, or set RAY_ADDRESS."
        )
    visible = settings.CUDA_VISIBLE_DEVICES.get()
    gpus = "all" if visible is None else ",".join(sorted(part.strip() for part in visible.split(",")))
    identity = json.dumps([socket.gethostname(), sys.executable, gpus])
    path = directory / f"ray-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def _read_record(path: Path) -> _LocalCluster | None:
    try:
        cluster = _LocalCluster.from_json(path.read_text())
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None  # none yet, or written by another version of this project
    return cluster if cluster.can_be_joined() else None


def _write_record(path: Path) -> None:
    node = _node()
    gcs_pid = node.all_processes[ray_constants.PROCESS_TYPE_GCS_SERVER][0].process.pid
    record = _LocalCluster(
        address=node.gcs_address,
        owner=_Process.of(os.getpid()),
        gcs=_Process.of(gcs_pid),
        auth_mode=settings.snapshot().get("RAY_AUTH_MODE"),
        ray_version=ray.__version__,
    )
    write_atomically(path, json.dumps(asdict(record)))
    # Runs before Ray's own exit handler, which was registered when Ray was imported.
    atexit.register(_withdraw_record, path, record)


def _withdraw_record(path: Path, record: _LocalCluster) -> None:
    if os.getpid() == record.owner.pid and _read_record(path) == record:
        path.unlink(missing_ok=True)


def _link_session(log_dir: Path) -> None:
    session = Path(_node().get_session_dir_path())
    log_dir.mkdir(parents=True, exist_ok=True)
    link = log_dir / "ray"
    temporary = log_dir / f".ray.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(session)
    temporary.replace(link)
