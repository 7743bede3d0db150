"""Wraps the parts of Ray's private API that this project needs; nothing else in nemo_rl uses `ray._private`.

Checked with Ray 2.60. `tests/distributed/test_ray_private.py` lists every private name and signature used here and
fails, naming it, when a new version of Ray changes one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import ray
from ray._private import ray_constants, services, state
from ray._private import worker as ray_worker
from ray._private.node import Node
from ray._raylet import DASHBOARD_AGENT_LISTEN_PORT_NAME, Config, persist_port  # type: ignore[attr-defined]

from nemo_rl.distributed.cluster.ports import block_range, promised_ports
from nemo_rl.errors import ClusterError

logger = logging.getLogger(__name__)

# Ray's own limit for a node to start, in seconds; it cannot be configured.
RAY_START_LIMIT_S = 30.0
_AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", "dashboard_agent_listen_port")
_AUTH_SETUP_LOGGER = "ray._private.authentication.authentication_token_setup"
_UPLOAD_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


def current_node() -> Node | None:
    """Return the Ray node that this process is connected to; None before `ray.init`.

    Its `session_name`, `gcs_address`, `webui_url`, `ray_init_cluster`, `get_session_dir_path()` and
    `get_runtime_env_dir_path()` may be used.
    """
    return ray_worker._global_node


def connected_node() -> Node:
    """Return the Ray node that this process is connected to. It must be connected."""
    node = current_node()
    assert node is not None, "not connected to Ray"
    return node


def gcs_pid() -> int:
    """Return the process id of the GCS server that this process has started."""
    return connected_node().all_processes[ray_constants.PROCESS_TYPE_GCS_SERVER][0].process.pid


def available_resources() -> dict[str, dict[str, float]]:
    """Return the free resources of each alive node, by node id (hex)."""
    return state.available_resources_per_node()


def actor_states(job_id: ray.JobID) -> dict[str, dict[str, Any]]:
    """Return the state of each actor of a job, by actor id (hex): `Pid`, `Address`, `State` and other keys."""
    return state.actors(job_id=job_id)


def actor_id(handle: ray.actor.ActorHandle) -> str:
    """Return the id (hex) of an actor, as the errors of Ray carry it."""
    return handle._actor_id.hex()


# --- switches that Ray reads from its environment only once, when it is imported --------------------------------------


def disable_uv_run_hook() -> None:
    """Turn Ray's `uv run` hook off.

    With the hook, Ray uploads the directory of a driver started by `uv run` and starts every worker with `uv run`.
    """
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False


def keep_loopback_addresses() -> None:
    """Stop Ray from replacing 127.0.0.1 by an address that other machines can reach.

    Ray does this on macOS and Windows, where `RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER` turns the replacement on.
    """
    ray_constants.ENABLE_RAY_CLUSTER = False


def use_setup_worker(path: str) -> None:
    """Make the raylets that this process starts run the script `path` in place of Ray's `setup_worker.py`."""
    # Ray joins the name to its own directory; an absolute path replaces the directory.
    ray_constants.SETUP_WORKER_FILENAME = path


def reload_config() -> None:
    """Make Ray's C++ part read its environment variables again, such as `RAY_AUTH_MODE`."""
    Config.initialize("")


def hide_auth_notice() -> None:
    """Hide Ray's warning, at each start of a cluster, that token authentication is on."""
    logging.getLogger(_AUTH_SETUP_LOGGER).setLevel(logging.ERROR)


def hide_upload_notices() -> None:
    """Hide the messages that Ray logs while a job is submitted and its directories are uploaded."""
    for name in _UPLOAD_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


# --- starting a node --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def patient_start(limit_s: float) -> Iterator[None]:
    """Give nodes that this process starts `limit_s` seconds to register instead of Ray's 30, while the block runs.

    On a machine with more runnable processes than cores, Ray's processes import their packages in more than 30 s. After
    `RAY_START_LIMIT_S`, a warning names the load.

    A raylet aborts if its agents do not name the ports that they chose within 15 s (Ray's issue 65983). Nodes that are
    started here get these ports in advance, so that the raylet need not wait. If it ends nevertheless, the start fails
    at once.
    """
    original_get_node, original_start_raylet = services.get_node, Node.start_raylet

    def get_node(gcs_address: str, node_id: str) -> Any:
        started = time.monotonic()
        warned = False
        while True:
            try:
                return original_get_node(gcs_address, node_id)
            except RuntimeError:  # the node has not registered yet
                if _raylet_has_ended():
                    raise ClusterError("Ray's raylet has ended during its start.") from None
                waited = time.monotonic() - started
                if waited > limit_s:
                    raise
                if waited > RAY_START_LIMIT_S and not warned:
                    warned = True
                    logger.warning(
                        "Ray has not started after %.0f s (load average %.0f on %d CPUs); waiting up to %.0f s",
                        waited,
                        os.getloadavg()[0],
                        os.cpu_count() or 1,
                        limit_s,
                    )
                time.sleep(0.1)

    def start_raylet(node: Node, *args: Any, **kwargs: Any) -> None:
        if block_range("agents") is not None:  # else any client socket could take the ports before the agents do
            for name, port in zip(_AGENT_PORTS, promised_ports(len(_AGENT_PORTS), "agents"), strict=True):
                setattr(node._ray_params, name, port)
            # Ray passes the last port to the agent only. The raylet reads it where the agent will write it.
            listen_port = node._ray_params.dashboard_agent_listen_port
            persist_port(node._session_dir, node._node_id, DASHBOARD_AGENT_LISTEN_PORT_NAME, listen_port)
        original_start_raylet(node, *args, **kwargs)

    services.get_node, Node.start_raylet = get_node, start_raylet  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        services.get_node, Node.start_raylet = original_get_node, original_start_raylet  # type: ignore[method-assign]


def _raylet_has_ended() -> bool:
    """Whether this process has started raylets, and all of them have ended."""
    states = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() == "raylet":
                states.add(child.status())
    return states == {psutil.STATUS_ZOMBIE}


# --- runtime_env ------------------------------------------------------------------------------------------------------


def upload_directories(runtime_env: Mapping[str, Any]) -> dict[str, Any]:
    """Upload the local directories of `working_dir` and `py_modules` and return the fields with their URIs.

    `ray.init` does this for a job; Ray has no public call that does it for one actor.

    Raises:
        Exception: `ValueError`, `TypeError` or `RuntimeError` of Ray, for a directory that is missing or too large.
    """
    from ray._private.runtime_env.py_modules import upload_py_modules_if_needed
    from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

    scratch_dir = connected_node().get_runtime_env_dir_path()
    fields = upload_py_modules_if_needed(dict(runtime_env), include_gitignore=True, scratch_dir=scratch_dir)
    return dict(upload_working_dir_if_needed(fields, include_gitignore=True, scratch_dir=scratch_dir))


def upload_setup_hook(runtime_env: Mapping[str, Any]) -> dict[str, Any]:
    """Pickle the function `worker_process_setup_hook` into Ray's store and return the fields with its key.

    Ray passes the key to the worker in `env_vars`, which must be a dict.

    Raises:
        Exception: `TypeError` or `RuntimeError` of Ray, for a hook that cannot be pickled.
    """
    from ray._private.runtime_env.setup_hook import upload_worker_process_setup_hook_if_needed

    return dict(upload_worker_process_setup_hook_if_needed(dict(runtime_env), ray_worker.global_worker))
