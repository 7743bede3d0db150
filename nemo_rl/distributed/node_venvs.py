"""Make venvs ready on every node of the Ray cluster, before any worker starts.

::

    driver ── plan (once per py_executable) ──┬─► own node: survey, build          in this process
                                              └─► every other node: survey         one zero-CPU Ray task
           ◄── who shares a venv directory, what is missing where ──
    first node of each shared directory ── builds all that is missing, in parallel ── streams progress
    the others that share it            ── idle until the seals are there, then look at them
           ◄── one NodeVenv per node and venv

No placement group, no sleeping, no lock between nodes besides the engine's own. What was proven in this job is not
asked again: a second call for the same content runs no task.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nemo_rl import settings
from nemo_rl.distributed import node_venv_host
from nemo_rl.distributed.node_venv_host import Request, Survey, driver_variables
from nemo_rl.distributed.node_venv_report import (
    NodeProgress,
    NodeProgressCallback,
    NodeVenv,
    NodeVenvReport,
    SharedFailureError,
    raise_for_failures,
)
from nemo_rl.distributed.nodes import alive_nodes
from nemo_rl.distributed.placement import NodeResources
from nemo_rl.distributed.ray_session import init_ray, job_name
from nemo_rl.errors import ClusterError, VenvError
from nemo_rl.venvs import Progress, Spec, VenvPlan, plan

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

_POLL_S = 0.02
# Ray neither answers Ctrl-C while it waits without a time-out, nor promises to notice every lost node.
_REMOTE_POLL_S = 0.5
_LIVENESS_INTERVAL_S = 5.0
_NODE_IS_GONE = (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError)

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
        found = _Campaign(requests, here, progress).run() if requests else {}
        entries = []
        for node in nodes:
            for name, the_plan in plans.items():
                entry = found.get((node.node_id, name)) or known.get((scope, node.node_id, name, the_plan.digest))
                if entry is None:
                    logger.warning("node %s left the cluster while its venvs were made ready", node.address)
                    break
                entries.append(entry)
                if entry.error is None:
                    _proven[scope, node.node_id, name, the_plan.digest] = replace(entry, built=False, seconds={})
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


def _forget_all_but(scope: tuple[str, str]) -> None:
    for key in [key for key in _proven if key[0] != scope]:
        del _proven[key]


@dataclass
class _Directory:
    """A venv directory that one or several nodes share, while something is built in it.

    Attributes:
        builder: digest -> id of the node that builds it.
        outcome: digest -> what became of it.
        waiting: node id -> names of the venvs that other nodes build for it.
    """

    builder: dict[str, str] = field(default_factory=dict)
    outcome: dict[str, NodeVenv] = field(default_factory=dict)
    waiting: dict[str, list[str]] = field(default_factory=dict)


class _Campaign:
    """One call's work on all nodes that need any. Runs in the caller's thread; only the own node's builds do not."""

    def __init__(self, requests: Mapping[str, Request], here: str, progress: NodeProgressCallback | None) -> None:
        self._requests = requests
        self._here = here
        self._progress = progress
        self._found: dict[tuple[str, str], NodeVenv] = {}
        self._directories: dict[str, _Directory] = {}
        self._surveys: dict[ray.ObjectRef, str] = {}
        self._streams: dict[ray.ObjectRefGenerator, Request] = {}
        self._own: queue.SimpleQueue[NodeProgress | NodeVenv | None] = queue.SimpleQueue()
        self._own_threads = 0
        self._plans: dict[tuple[str, ...], ray.ObjectRef] = {}
        # Without a runtime_env, so that a node's idle processes can serve it.
        self._survey_task: Any = ray.remote(num_cpus=0, max_retries=0)(node_venv_host.survey_as_task)
        self._serve_task: Any = ray.remote(num_cpus=0, max_retries=0, num_returns="streaming")(
            node_venv_host.serve_as_task
        )
        self._next_liveness_check = time.monotonic() + _LIVENESS_INTERVAL_S

    def run(self) -> dict[tuple[str, str], NodeVenv]:
        """(node id, venv name) -> entry; nothing for nodes that left the cluster."""
        try:
            for node_id, request in self._requests.items():
                if node_id != self._here:
                    self._surveys[self._submit(self._survey_task, request)] = node_id
            if self._here in self._requests:
                self._take_survey(self._here, node_venv_host.survey(self._requests[self._here]))
            while self._surveys or self._streams or self._own_threads:
                self._step()
        except BaseException:
            for reference in [*self._surveys, *self._streams]:
                ray.cancel(reference, force=True)
            raise
        return self._found

    def _submit(self, task: Any, request: Request) -> Any:
        names = tuple(request.plans)
        if names not in self._plans:
            self._plans[names] = ray.put(request.plans)
        strategy = NodeAffinitySchedulingStrategy(request.node_id, soft=False)
        options = task.options(scheduling_strategy=strategy, name=f"venvs on {request.node}")
        return options.remote(replace(request, plans={}), self._plans[names])

    def _step(self) -> None:
        remote = [*self._surveys, *self._streams]
        own_wait = _POLL_S
        if remote:
            ready, _ = ray.wait(remote, num_returns=1, timeout=_POLL_S if self._own_threads else _REMOTE_POLL_S)
            own_wait = 0.0
            for reference in ready:
                if reference in self._surveys:
                    self._finish_survey(reference)
                else:
                    self._read_stream(reference)
            if not ready:
                self._drop_lost_nodes()
        while self._own_threads:
            try:
                item = self._own.get(timeout=own_wait) if own_wait else self._own.get_nowait()
            except queue.Empty:
                return
            if item is None:
                self._own_threads -= 1
            else:
                self._take(item)

    def _finish_survey(self, reference: ray.ObjectRef) -> None:
        node_id = self._surveys.pop(reference)
        try:
            self._take_survey(node_id, ray.get(reference))
        except ray.exceptions.RayError as error:
            self._fail(self._requests[node_id], error)

    def _read_stream(self, stream: ray.ObjectRefGenerator) -> None:
        try:
            self._take(ray.get(next(stream)))
        except StopIteration:
            del self._streams[stream]
        except ray.exceptions.RayError as error:
            self._fail(self._streams.pop(stream), error)

    def _drop_lost_nodes(self) -> None:
        if time.monotonic() < self._next_liveness_check:
            return
        self._next_liveness_check = time.monotonic() + _LIVENESS_INTERVAL_S
        alive = {node.node_id for node in alive_nodes()}
        self._surveys = {reference: node_id for reference, node_id in self._surveys.items() if node_id in alive}
        for stream, request in list(self._streams.items()):
            if request.node_id not in alive:
                del self._streams[stream]
                self._replace_builder(request.node_id)

    # --- who builds, who waits ---------------------------------------------------------------------------------------

    def _take_survey(self, node_id: str, answer: Survey) -> None:
        for entry in answer.done:
            self._found[node_id, entry.venv] = entry
        if answer.missing:
            directory = self._directories.setdefault(answer.store_id or node_id, _Directory())
            self._assign(directory, node_id, answer.missing)

    def _assign(self, directory: _Directory, node_id: str, names: Sequence[str]) -> None:
        """The first node that lacks a content builds it; those that share its directory wait for it."""
        request = self._requests[node_id]
        mine: list[str] = []
        others: list[str] = []
        for name in names:
            builder = directory.builder.setdefault(request.plans[name].digest, node_id)
            (mine if builder == node_id else others).append(name)
        if mine:
            self._serve(replace(request, plans={name: request.plans[name] for name in mine}))
        if others:
            directory.waiting[node_id] = others
            for name in others:
                digest = request.plans[name].digest
                detail = f"for {self._requests[directory.builder[digest]].node}, which has the same venv directory"
                self._tell(NodeProgress(node_id, request.node, Progress(name, digest, "wait", "started", 0.0, detail)))
            self._release(directory)

    def _take(self, item: NodeProgress | NodeVenv) -> None:
        if isinstance(item, NodeProgress):
            self._tell(item)
            return
        self._found[item.node_id, item.venv] = item
        digest = self._requests[item.node_id].plans[item.venv].digest
        for directory in self._directories.values():
            if directory.builder.get(digest) == item.node_id:
                directory.outcome.setdefault(digest, item)
                self._release(directory)

    def _release(self, directory: _Directory) -> None:
        """Let those nodes look whose venvs are all built, or fail with the node that was to build them."""
        for node_id, names in list(directory.waiting.items()):
            request = self._requests[node_id]
            outcomes = {
                name: directory.outcome[digest]
                for name in names
                if (digest := request.plans[name].digest) in directory.outcome
            }
            if len(outcomes) < len(names):
                continue
            del directory.waiting[node_id]
            for name, outcome in outcomes.items():
                if outcome.error is not None:
                    error = SharedFailureError(
                        f"not built: {outcome.node} failed to, which has the same venv directory."
                    )
                    self._found[node_id, name] = NodeVenv(name, node_id, request.node, outcome.digest, error=error)
            ready = {name: request.plans[name] for name, outcome in outcomes.items() if outcome.error is None}
            if ready:
                self._serve(replace(request, plans=ready, is_awaited=True))

    def _serve(self, request: Request) -> None:
        if request.node_id != self._here:
            self._streams[self._submit(self._serve_task, request)] = request
            return

        def pump() -> None:
            for item in node_venv_host.serve(request):
                self._own.put(item)
            self._own.put(None)

        self._own_threads += 1
        threading.Thread(target=pump, name="venvs", daemon=True).start()

    def _fail(self, request: Request, error: ray.exceptions.RayError) -> None:
        """A node's task died. A node that is gone needs no venvs; anything else is an error of all its venvs."""
        if isinstance(error, _NODE_IS_GONE) or request.node_id not in {node.node_id for node in alive_nodes()}:
            self._replace_builder(request.node_id)
            return
        cause = getattr(error, "cause", None) or error
        for name, the_plan in request.plans.items():
            if (request.node_id, name) not in self._found:
                reason = VenvError(f"its task there failed: {type(cause).__name__}: {cause}")
                self._take(NodeVenv(name, request.node_id, request.node, the_plan.digest, error=reason))

    def _replace_builder(self, gone: str) -> None:
        """What a node that left was to build is built by one of those that wait for it."""
        for directory in self._directories.values():
            directory.waiting.pop(gone, None)
            for digest in [d for d, builder in directory.builder.items() if builder == gone]:
                if digest not in directory.outcome:
                    del directory.builder[digest]
            for node_id, names in list(directory.waiting.items()):
                plans = self._requests[node_id].plans
                if any(plans[name].digest not in directory.builder for name in names):
                    del directory.waiting[node_id]
                    self._assign(directory, node_id, names)

    def _tell(self, event: NodeProgress) -> None:
        if self._progress is not None:
            self._progress(event)
