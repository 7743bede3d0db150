"""Make venvs ready on every node of the Ray cluster before any worker starts.

::

    driver ── plan (once per py_executable) ──┬─► driver's node: survey, build     in this process
                                              └─► every other node: survey         one Ray task without CPUs
           ◄── shared venv directories, missing venvs
    first node of each shared directory ── builds missing venvs, or receives them from another node
    other nodes with that directory     ── wait for the seals, then check them
           ◄── one NodeVenv per node and venv

There is no placement group and no sleeping, and no lock between nodes except the venv engine's. A venv that was found
ready once in this job is not checked again, so a second call for the same content runs no task.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

import ray

from nemo_rl import settings
from nemo_rl.distributed.cluster.nodes import alive_nodes, worker_nodes
from nemo_rl.distributed.cluster.placement import NodeResources
from nemo_rl.distributed.cluster.session import init_ray, job_name
from nemo_rl.distributed.provisioning.coordinator import ProvisioningCoordinator
from nemo_rl.distributed.provisioning.driver_copy import check_driver_copies
from nemo_rl.distributed.provisioning.node_task import Request, driver_variables, is_ready
from nemo_rl.distributed.provisioning.progress_view import VenvProgressView
from nemo_rl.distributed.provisioning.report import (
    NodeProgress,
    NodeProgressCallback,
    NodeVenv,
    NodeVenvReport,
    raise_for_failures,
)
from nemo_rl.distributed.provisioning.source_sync import distribute_source
from nemo_rl.errors import ClusterError
from nemo_rl.venvs import Spec, Store, VenvPlan, plan

__all__ = [
    "NodeProgress",
    "NodeProgressCallback",
    "NodeVenv",
    "NodeVenvReport",
    "create_local_venv_on_each_node",
    "ensure_venv_on_node",
    "ensure_venvs_on_each_node",
]

logger = logging.getLogger(__name__)

# Venvs that are ready in this job: (job and the driver's venv directory, node id, venv name, digest) -> result.
_ready: dict[tuple[tuple[str, str], str, str, str], NodeVenv] = {}
_lock = threading.RLock()


def create_local_venv_on_each_node(py_executable: str, venv_name: str) -> str:
    """Make one venv ready on every alive node that can run workers; return the path of its interpreter.

    Args:
        py_executable: a `uv run ...` string, or the path of an interpreter.
        venv_name: name of the venv in `<venv dir>`, such as a worker's FQN.

    Returns:
        `<venv dir>/<venv_name>/bin/python`; for the path of an interpreter, that path. If the nodes have different venv
        directories, the path on the driver's node.

    Raises:
        NodeVenvError: the venv is not ready on some node; says on which node and why.
        VenvError: the venv cannot be planned: an invalid py_executable, an unknown extra, a stale lock, ...

    Example::

        python = create_local_venv_on_each_node(PY_EXECUTABLES.VLLM, "my_package.MyWorker")
    """
    return ensure_venvs_on_each_node({venv_name: py_executable}).of(venv_name)[0].python


def ensure_venvs_on_each_node(
    venvs: Mapping[str, str | Spec | VenvPlan], *, progress: NodeProgressCallback | None = None
) -> NodeVenvReport:
    """Make several venvs ready on every alive node that can run workers, in parallel.

    Call it once per job, before GPUs are reserved. Another call for the same venvs takes little time.
    `NRL_FORCE_REBUILD_VENVS` rebuilds each venv once per job and node. Connects to Ray if necessary (`init_ray`).

    Args:
        venvs: venv name -> py_executable, spec or plan.
        progress: called in this thread with every event of every node. Default: the session's display, see
            `NEMO_RL_PROGRESS`.

    Raises:
        NodeVenvError: a venv is not ready on some node; says which venv, on which node and why, and the results of the
            others. All nodes have ended their work before it is raised.
        VenvError: a venv cannot be planned. Nothing has been built.

    Example::

        report = ensure_venvs_on_each_node({"a.Worker": PY_EXECUTABLES.VLLM, "b.Worker": PY_EXECUTABLES.MCORE})
        print(report.python("a.Worker"))
    """
    init_ray()
    return _ensure(venvs, worker_nodes(), progress)


def ensure_venv_on_node(
    node_id: str,
    py_executable: str | Spec | VenvPlan,
    venv_name: str,
    *,
    progress: NodeProgressCallback | None = None,
) -> NodeVenv:
    """Make one venv ready on one node, such as a node that joined after `ensure_venvs_on_each_node`.

    Raises:
        ClusterError: the node is not alive.
        NodeVenvError, VenvError: see `ensure_venvs_on_each_node`.
    """
    nodes = [node for node in alive_nodes() if node.node_id == node_id]
    if not nodes:
        raise ClusterError(f"the venv {venv_name} cannot be made ready on node {node_id}: the node is not alive.")
    return _ensure({venv_name: py_executable}, nodes, progress).entries[0]


def _ensure(
    venvs: Mapping[str, str | Spec | VenvPlan], nodes: list[NodeResources], progress: NodeProgressCallback | None
) -> NodeVenvReport:
    start = time.monotonic()
    plans = _plan_all(venvs)
    check_driver_copies(plans)
    job = job_name()
    driver_node = ray.get_runtime_context().get_node_id()
    distribute_source(nodes, plans.values())
    with _lock:
        scope = (job, str(settings.venv_dir()))
        for key in [key for key in _ready if key[0] != scope]:
            del _ready[key]
        known = {key: entry for key, entry in _ready.items() if key[1] != driver_node}
        requests = {}
        for node in nodes:
            needed = {name: p for name, p in plans.items() if (scope, node.node_id, name, p.digest) not in known}
            if needed:
                variables = {} if node.node_id == driver_node else driver_variables()
                force = settings.FORCE_REBUILD_VENVS.get()
                requests[node.node_id] = Request(node.node_id, node.address, needed, job, force, variables)
        results = {}
        if requests:
            addresses = {node.node_id: node.address for node in alive_nodes()}
            sources = _sources(plans, scope, driver_node, addresses)
            with contextlib.nullcontext(progress) if progress is not None else VenvProgressView() as report_progress:
                results = ProvisioningCoordinator(
                    requests, driver_node, report_progress, addresses=addresses, sources=sources
                ).run()
        entries = []
        for node in nodes:
            for name, venv_plan in plans.items():
                entry = results.get((node.node_id, name)) or known.get((scope, node.node_id, name, venv_plan.digest))
                if entry is None:
                    logger.warning("node %s left the cluster while its venvs were made ready", node.address)
                    break
                entries.append(entry)
                if entry.error is None:
                    _ready[scope, node.node_id, name, venv_plan.digest] = replace(
                        entry, built=False, seconds={}, received_from=""
                    )
    raise_for_failures(entries)
    return NodeVenvReport(tuple(entries), time.monotonic() - start)


def _plan_all(venvs: Mapping[str, str | Spec | VenvPlan]) -> dict[str, VenvPlan]:
    """Return the plan of each venv. Equal py_executables are planned once."""
    by_text: dict[str, VenvPlan] = {}
    plans: dict[str, VenvPlan] = {}
    for name, py_executable in venvs.items():
        if isinstance(py_executable, VenvPlan):
            plans[name] = py_executable
            continue
        text = str(py_executable)
        if text not in by_text:
            by_text[text] = plan(py_executable)
            by_text[text].check_compatible()
        plans[name] = by_text[text]
    return plans


def _sources(
    plans: Mapping[str, VenvPlan], scope: tuple[str, str], driver_node: str, alive: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Return digest -> node id -> interpreter, for nodes that are known to have the venv; the driver's node first."""
    sources: dict[str, dict[str, str]] = {}
    store = Store.default()
    for venv_plan in plans.values():
        request = Request(driver_node, "", {}, scope[0], settings.FORCE_REBUILD_VENVS.get())
        if not venv_plan.is_interpreter and is_ready(venv_plan, store, request):
            sources[venv_plan.digest] = {driver_node: str(store.link(venv_plan.digest) / "bin" / "python")}
    for (_, node_id, _, digest), entry in _ready.items():
        if node_id in alive and entry.digest == digest:
            sources.setdefault(digest, {}).setdefault(node_id, entry.stable_python)
    return sources
