"""Make venvs ready on every node of the Ray cluster, before any worker starts.

::

    driver ── plan (once per py_executable) ──┬─► own node: survey, build          in this process
                                              └─► every other node: survey         one zero-CPU Ray task
           ◄── who shares a venv directory, what is missing where ──
    first node of each shared directory ── builds what is missing, or receives it from a node that has it
    the others that share it            ── idle until the seals are there, then look at them
           ◄── one NodeVenv per node and venv

No placement group, no sleeping, no lock between nodes besides the engine's own. What was proven in this job is not
asked again: a second call for the same content runs no task.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

import ray

from nemo_rl import settings
from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.cluster.placement import NodeResources
from nemo_rl.distributed.cluster.session import init_ray, job_name
from nemo_rl.distributed.provisioning.coordinator import Campaign
from nemo_rl.distributed.provisioning.node_task import Request, driver_variables, is_ready
from nemo_rl.distributed.provisioning.report import (
    NodeProgress,
    NodeProgressCallback,
    NodeVenv,
    NodeVenvReport,
    raise_for_failures,
)
from nemo_rl.distributed.provisioning.source_sync import bring_source
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

# What is known to be ready in this job: (job and the driver's venv directory, node id, venv name, digest) -> entry.
_proven: dict[tuple[tuple[str, str], str, str, str], NodeVenv] = {}
_lock = threading.RLock()


def create_local_venv_on_each_node(py_executable: str, venv_name: str) -> str:
    """Make one venv ready on every alive node that can run workers; return its interpreter's path.

    The path is `<venv dir>/<venv_name>/bin/python` (for an interpreter's path: that path), on the driver's node where
    nodes have different venv directories.

    Raises:
        NodeVenvError: it could not be made ready on some node.
        VenvError: it cannot be planned at all: a bad py_executable, an unknown extra, a stale lock, ...
    """
    return ensure_venvs_on_each_node({venv_name: py_executable}).of(venv_name)[0].python


def ensure_venvs_on_each_node(
    venvs: Mapping[str, str | Spec | VenvPlan], *, progress: NodeProgressCallback | None = None
) -> NodeVenvReport:
    """Make all `venvs` (name -> what they hold) ready on every alive node that can run workers, all at once.

    Call it once per job, before any GPU is reserved; calling it again costs little. `NRL_FORCE_REBUILD_VENVS` rebuilds
    each venv once per job and node. Connects to Ray if nobody has (`init_ray`).

    Args:
        progress: called in this thread with every event of every node.

    Raises:
        NodeVenvError: some venv could not be made ready on some node; says which, where, why, and what the rest did.
            All nodes have ended their work by then.
        VenvError: a venv cannot be planned at all. Nothing has been built then.
    """
    init_ray()
    nodes = [node for node in alive_nodes() if node.total.get("CPU", 0) > 0 or node.total.get("GPU", 0) > 0]
    return _ensure(venvs, nodes, progress)


def ensure_venv_on_node(
    node_id: str,
    py_executable: str | Spec | VenvPlan,
    venv_name: str,
    *,
    progress: NodeProgressCallback | None = None,
) -> NodeVenv:
    """Make one venv ready on one node, such as one that joined after `ensure_venvs_on_each_node`.

    Raises:
        ClusterError: there is no such node any more.
        NodeVenvError, VenvError: see `ensure_venvs_on_each_node`.
    """
    nodes = [node for node in alive_nodes() if node.node_id == node_id]
    if not nodes:
        raise ClusterError(f"the venv {venv_name} cannot be made ready on node {node_id}: it is not alive.")
    return _ensure({venv_name: py_executable}, nodes, progress).entries[0]


def _ensure(
    venvs: Mapping[str, str | Spec | VenvPlan], nodes: list[NodeResources], progress: NodeProgressCallback | None
) -> NodeVenvReport:
    began = time.monotonic()
    plans = _plans(venvs)
    job = job_name()
    here = ray.get_runtime_context().get_node_id()
    bring_source(nodes, plans.values())
    with _lock:
        scope = (job, str(settings.venv_dir()))
        _forget_all_but(scope)
        known = {key: entry for key, entry in _proven.items() if key[1] != here}
        requests = {}
        for node in nodes:
            needed = {name: p for name, p in plans.items() if (scope, node.node_id, name, p.digest) not in known}
            if needed:
                variables = {} if node.node_id == here else driver_variables()
                force = settings.FORCE_REBUILD_VENVS.get()
                requests[node.node_id] = Request(node.node_id, node.address, needed, job, force, variables)
        found = {}
        if requests:
            addresses = {node.node_id: node.address for node in alive_nodes()}
            sources = _sources(plans, scope, here, addresses)
            found = Campaign(requests, here, progress, addresses=addresses, sources=sources).run()
        entries = []
        for node in nodes:
            for name, venv_plan in plans.items():
                entry = found.get((node.node_id, name)) or known.get((scope, node.node_id, name, venv_plan.digest))
                if entry is None:
                    logger.warning("node %s left the cluster while its venvs were made ready", node.address)
                    break
                entries.append(entry)
                if entry.error is None:
                    _proven[scope, node.node_id, name, venv_plan.digest] = replace(
                        entry, built=False, seconds={}, received_from=""
                    )
    raise_for_failures(entries)
    return NodeVenvReport(tuple(entries), time.monotonic() - began)


def _plans(venvs: Mapping[str, str | Spec | VenvPlan]) -> dict[str, VenvPlan]:
    """One plan per venv, made once for each different py_executable."""
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
    plans: Mapping[str, VenvPlan], scope: tuple[str, str], here: str, alive: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Who is known to have these contents: digest -> node id -> interpreter there. The driver's node comes first."""
    sources: dict[str, dict[str, str]] = {}
    store = Store.default()
    for venv_plan in plans.values():
        request = Request(here, "", {}, scope[0], settings.FORCE_REBUILD_VENVS.get())
        if not venv_plan.is_interpreter and is_ready(venv_plan, store, request):
            sources[venv_plan.digest] = {here: str(store.link(venv_plan.digest) / "bin" / "python")}
    for (_, node_id, _, digest), entry in _proven.items():
        if node_id in alive and entry.digest == digest:
            sources.setdefault(digest, {}).setdefault(node_id, entry.stable_python)
    return sources


def _forget_all_but(scope: tuple[str, str]) -> None:
    for key in [key for key in _proven if key[0] != scope]:
        del _proven[key]
