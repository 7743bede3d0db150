"""Connects a driver to Ray: joins the cluster that the job runs on, or starts a local one.

::

    init_ray ──RAY_ADDRESS=host:port─────────────► join it
             ──RAY_ADDRESS=local─────────────────► start a cluster that no other driver joins
             ──unset──► lock ─► record, alive? ──► join it
                              └─► else ──────────► start a cluster and publish its record

A local cluster ends with the driver, or the warm session (`warm_session`), that started it. Its record: see
`local_clusters`.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import ray

from nemo_rl import settings
from nemo_rl.distributed import ray_private
from nemo_rl.distributed.cluster.local_clusters import (
    LocalCluster,
    WarmSession,
    locked_record,
    read_record,
    remove_record,
    write_record,
)
from nemo_rl.distributed.cluster.template_client import DRIVERS_LOCK, TEMPLATE_VARIABLE
from nemo_rl.distributed.ray_private import connected_node
from nemo_rl.errors import ClusterError
from nemo_rl.utils.processes import ProcessIdentity

logger = logging.getLogger(__name__)

# Set when a local cluster starts, unless the user has set them. On two idle cores `ray.init` takes about 4.2 s with
# Ray's defaults and 2.3 s with these (the difference is a multiple of Ray's one-second poll for its node).
LOCAL_RAY_VARIABLES = {
    # Nothing scrapes a local cluster's metrics; collecting them costs CPU time in every Ray process.
    "RAY_enable_metrics_collection": "0",
    # By default Ray starts one process of the driver's Python per core and makes the driver wait for them.
    # Almost all workers of this project run in another Python and would compete with those processes for the cores.
    "RAY_prestart_worker_first_driver": "0",
    # Ray starts workers at niceness 15. A process at niceness 0 on the same core then gets thirty times as much of it,
    # and threads that wait for one another make that the time of every operation.
    "RAY_worker_niceness": "0",
}

# The path of a socket has at most 107 bytes; Ray appends `/ray/session_<time>_<pid>/sockets/plasma_store`.
_MAX_TEMP_DIR_BYTES = 107 - 72

_CONNECT_TIMEOUT_S = 5.0

# A busy machine takes longer to start Ray's processes than the 30 s that Ray gives them.
_START_LIMIT_S = 120.0

_process_lock = threading.Lock()
_held_sessions: list[IO[str]] = []  # closed by the kernel when this process ends


def init_ray(log_dir: str | None = None) -> None:
    """Connect this process to Ray: to `RAY_ADDRESS`, to this project's running local cluster, or to a new local one.

    A second call in the same process has no effect. No working directory is uploaded, and Ray's `uv run` hook is off.
    A cluster started here listens on the loopback interface only, uses token authentication, and has no dashboard
    (`NEMO_RL_RAY_DASHBOARD=1` starts one).

    Example::

        from nemo_rl.distributed.virtual_cluster import init_ray

        init_ray(log_dir="results/run1")  # results/run1/ray -> /tmp/ray/session_...

    Args:
        log_dir: directory in which to create a symbolic link `ray` to Ray's session directory, which holds the logs of
            all workers.

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

    For tests and benchmarks. `num_cpus` and `num_gpus` may be more than the machine has.
    """
    with _process_lock:
        return _start_local(num_cpus, num_gpus)


def start_session_cluster(templates: Path) -> LocalCluster:
    """Start the cluster of a warm session in this process, publish its record, and return it.

    Args:
        templates: directory of the session's templates.
    """
    settings.export({TEMPLATE_VARIABLE: f"{templates}/"})  # for the raylet
    with _process_lock, locked_record() as path:
        _start_local()
        return _publish(path, WarmSession.of_this_process(templates))


def _hold_session(templates: Path) -> None:
    """Keep a warm session from ending while this process runs."""
    lock = open(templates / DRIVERS_LOCK, "a")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_SH)
    _held_sessions.append(lock)


def can_grow() -> bool:
    """Return whether more nodes may join the cluster. A local cluster always has one node."""
    return not connected_node().ray_init_cluster and _joined_local_cluster is None


def job_name() -> str:
    """Return a name of this driver's job that is unique across clusters."""
    return f"{connected_node().session_name}/{ray.get_runtime_context().get_job_id()}"


def _connect() -> None:
    address = settings.RAY_ADDRESS.get()
    if address == "local":
        _start_local()
    elif address is not None:
        _join(address)
    else:
        with locked_record() as path:
            running = read_record(path)
            if running is not None and running.session is not None:
                difference = running.session.difference()
                if difference is not None:
                    logger.warning(
                        "the warm session is not used: %s. Start it again from here: `nemo-rl session stop`, then "
                        "`nemo-rl session start`",
                        difference,
                    )
                    _start_local()
                    return
            if running is None or not _join_local(running):
                _start_local()
                _publish(path)


# --- joining ------------------------------------------------------------------------------------------------

_joined_local_cluster: LocalCluster | None = None


def _join(address: str) -> None:
    global _joined_local_cluster
    _set_switches()
    try:
        _check_reachable(address)
        ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"cannot join the Ray cluster at RAY_ADDRESS={address}: {error}. Check that it is running and reachable. "
            "If it was started with token authentication, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to its token "
            "(`ray get-auth-token` on the head node). RAY_ADDRESS=local starts a local cluster instead."
        ) from error
    _joined_local_cluster = None
    logger.info("joined the Ray cluster at %s", address)


def _check_reachable(address: str) -> None:
    """Raise `OSError` if nothing listens at `host:port`. Ray would end this process without an exception."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "://" in address:
        return  # `auto`, or the address of a Ray client server
    deadline = time.monotonic() + _CONNECT_TIMEOUT_S  # the head node may still be starting
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _join_local(cluster: LocalCluster) -> bool:
    """Join another driver's local cluster. Returns whether it was still running."""
    global _joined_local_cluster
    _set_switches()
    if cluster.auth_mode is not None:
        # Ray looks for a token only when it discovers the cluster itself.
        settings.export({"RAY_AUTH_MODE": cluster.auth_mode})
        ray_private.reload_config()
    try:
        ray.init(address=cluster.address, logging_level=logging.WARNING)
    except (ConnectionError, ray.exceptions.RayError) as error:
        logger.info("the local Ray cluster at %s can no longer be joined: %s", cluster.address, error)
        return False
    _joined_local_cluster = cluster
    if cluster.session is not None:
        _hold_session(Path(cluster.session.templates))
        logger.info("joined the warm session of process %d", cluster.owner.pid)
        return True
    logger.warning(
        "joined the local Ray cluster of process %d, which sees the same GPUs; it ends when that process ends. "
        "RAY_ADDRESS=local starts a separate cluster.",
        cluster.owner.pid,
    )
    return True


# --- starting -----------------------------------------------------------------------------------------------


def _start_local(num_cpus: int | None = None, num_gpus: int | None = None) -> str:
    global _joined_local_cluster
    _set_switches()
    settings.export({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"})  # for the processes that Ray starts
    environment = settings.snapshot()
    settings.export({name: value for name, value in LOCAL_RAY_VARIABLES.items() if name not in environment})
    _ensure_auth_token(environment)
    # Ray's script costs each worker the CPU time of a second `import ray`; see setup_worker.py.
    ray_private.use_setup_worker(str(Path(__file__).with_name("setup_worker.py")))
    ray_private.hide_auth_notice()
    try:
        with settings.only_inheritable(), ray_private.patient_start(_START_LIMIT_S):
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
            f"cannot start a local Ray cluster: {error} Ray's logs are in its session directory (`logs/raylet.out`, "
            f"`logs/gcs_server.out`). The load average is {os.getloadavg()[0]:.0f} on {os.cpu_count()} CPUs: if it is "
            "high, stop other programs and try again, or set RAY_ADDRESS to a cluster that runs already."
        ) from error
    _joined_local_cluster = None
    node = connected_node()
    logger.info("started a local Ray cluster at %s; dashboard: %s", node.gcs_address, node.webui_url or "off")
    return node.gcs_address


def _ensure_auth_token(environment: Mapping[str, str]) -> None:
    """Create the file of Ray's token if it is missing. Ray would create it readable by all users of the machine.

    If the home directory is read-only, the token is only in this process's environment.
    """
    if environment.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        return
    home, token = settings.home_dir(), secrets.token_hex(32)
    path = home / ".ray" / "auth_token" if home is not None else None
    if path is not None and not path.exists():
        with contextlib.suppress(OSError):  # another process has just created it, or the directory is read-only
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="ascii") as private:
                private.write(token)
                private.flush()
                os.link(private.name, path)
    if path is None or not path.exists():
        settings.export({"RAY_AUTH_TOKEN": token})


def _short_temp_dir(environment: Mapping[str, str]) -> str | None:
    """Return a directory for Ray's session if `TMPDIR` is too long for socket paths; else None (Ray's default)."""
    default = environment.get("RAY_TMPDIR") or environment.get("TMPDIR", "/tmp")
    return "/tmp/ray" if len(os.fsencode(default)) > _MAX_TEMP_DIR_BYTES else None


def _set_switches() -> None:
    """Set what Ray has to know before `ray.init`: no `uv run` hook, and 127.0.0.1 stays the address of a node.

    A local cluster on loopback opens no port to other machines and survives a change of network. Clusters with other
    addresses are joined as before.
    """
    settings.export({"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"})  # for child processes; Ray has already read it in this one
    ray_private.disable_uv_run_hook()
    ray_private.keep_loopback_addresses()


# --- the record of a local cluster --------------------------------------------------------------------------


def _publish(path: Path, session: WarmSession | None = None) -> LocalCluster:
    record = LocalCluster(
        address=connected_node().gcs_address,
        owner=ProcessIdentity.of(os.getpid()),
        gcs=ProcessIdentity.of(ray_private.gcs_pid()),
        auth_mode=settings.snapshot().get("RAY_AUTH_MODE"),
        ray_version=ray.__version__,
        session=session,
    )
    write_record(path, record)
    # Runs before Ray's exit handler, which was registered when Ray was imported.
    atexit.register(remove_record, path, record)
    return record


def _link_session(log_dir: Path) -> None:
    session = Path(connected_node().get_session_dir_path())
    log_dir.mkdir(parents=True, exist_ok=True)
    link = log_dir / "ray"
    temporary = log_dir / f".ray.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(session)
    temporary.replace(link)
