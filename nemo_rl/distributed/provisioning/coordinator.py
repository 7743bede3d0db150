"""The driver's side of provisioning: build, await or send what the nodes lack, until every node has its venvs.

::

    survey of a node ── has the venv ────────────────────────────► source for other nodes
                     ── shares its directory with a builder ─────► waits for that builder, then checks the seal
                     ── lacks it; the first node to do so ───────► builds
                     ── lacks it, but another has or builds it ──► receives it from a node (`broadcast`)
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
from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.provisioning import node_task
from nemo_rl.distributed.provisioning.broadcast import BroadcastCoordinator, VenvKey
from nemo_rl.distributed.provisioning.node_task import Request, Survey, python_identity
from nemo_rl.distributed.provisioning.report import NodeProgress, NodeProgressCallback, NodeVenv, SharedFailureError
from nemo_rl.distributed.provisioning.source_sync import task_options
from nemo_rl.errors import BroadcastError, NoSpaceError, VenvBuildError, VenvError
from nemo_rl.venvs import Progress

logger = logging.getLogger(__name__)

_LOCAL_POLL_S = 0.02
# A wait without a timeout blocks Ctrl-C in Ray, and Ray may not report every lost node.
_REMOTE_POLL_S = 0.5
_LIVENESS_INTERVAL_S = 5.0
_NODE_LOST_ERRORS = (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError)


@dataclass
class _Directory:
    """A venv directory of one or several nodes, while venvs are built in it.

    Attributes:
        builders: digest -> id of the node that builds it.
        outcomes: digest -> result of its builder.
        waiting: node id -> names of the venvs that other nodes build for this node.
    """

    builders: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, NodeVenv] = field(default_factory=dict)
    waiting: dict[str, list[str]] = field(default_factory=dict)


class ProvisioningCoordinator:
    """Makes the venvs of one call ready on all nodes. Runs in the caller's thread; the driver's node builds in others.

    Args:
        requests: node id -> the venvs that the node needs.
        driver_node: id of the driver's node.
        progress: called with every event.
        addresses: node id -> address, of all alive nodes.
        sources: digest -> node id -> interpreter of the venv, for nodes that already have it.
    """

    def __init__(
        self,
        requests: Mapping[str, Request],
        driver_node: str,
        progress: NodeProgressCallback | None,
        *,
        addresses: Mapping[str, str],
        sources: Mapping[str, Mapping[str, str]],
    ) -> None:
        self._requests = requests
        self._driver_node = driver_node
        self._progress = progress
        self._results: dict[tuple[str, str], NodeVenv] = {}
        self._directories: dict[str, _Directory] = {}
        self._surveys: dict[ray.ObjectRef, str] = {}
        self._streams: dict[ray.ObjectRefGenerator, Request] = {}
        self._local_events: queue.SimpleQueue[NodeProgress | NodeVenv | None] = queue.SimpleQueue()
        self._num_local_threads = 0
        self._plans: dict[tuple[str, ...], ray.ObjectRef] = {}
        self._pythons: dict[tuple[str, str], str | None] = {}
        self._broadcast = (
            BroadcastCoordinator(requests, addresses, driver_node) if settings.VENV_SPREAD.get() == "auto" else None
        )
        self._add_known_sources(sources)
        # Without a runtime_env, so that idle worker processes of the node can run the tasks.
        self._survey_task: Any = ray.remote(num_cpus=0, max_retries=0)(node_task.survey)
        self._serve_task: Any = ray.remote(num_cpus=0, max_retries=0, num_returns="streaming")(node_task.serve_as_task)
        self._next_liveness_check = time.monotonic() + _LIVENESS_INTERVAL_S

    def run(self) -> dict[tuple[str, str], NodeVenv]:
        """Make all venvs ready; return (node id, venv name) -> result, without nodes that left the cluster."""
        try:
            for node_id, request in self._requests.items():
                if node_id != self._driver_node:
                    self._surveys[self._submit(self._survey_task, request)] = node_id
            if self._driver_node in self._requests:
                request = self._requests[self._driver_node]
                self._add_survey(self._driver_node, node_task.survey(request, request.plans))
            while self._surveys or self._streams or self._num_local_threads:
                self._process_events()
        except BaseException:
            for reference in [*self._surveys, *self._streams]:
                if not self._is_transfer(reference):
                    ray.cancel(reference, force=True)
            if self._broadcast is not None:
                self._broadcast.kill()
            raise
        if self._broadcast is not None:
            self._broadcast.close()
        return self._results

    def _add_known_sources(self, sources: Mapping[str, Mapping[str, str]]) -> None:
        for request in self._requests.values() if self._broadcast is not None else ():
            for venv_plan in request.plans.values():
                for node_id, python in sources.get(venv_plan.digest, {}).items():
                    assert self._broadcast is not None
                    self._broadcast.add_source((venv_plan.digest, python_identity(venv_plan)), node_id, python)

    def _submit(self, task: Any, request: Request) -> Any:
        names = tuple(request.plans)
        if names not in self._plans:
            self._plans[names] = ray.put(request.plans)
        strategy = NodeAffinitySchedulingStrategy(request.node_id, soft=False)
        options = task.options(
            scheduling_strategy=strategy, name=f"venvs on {request.node}", **task_options(request.node_id)
        )
        return options.remote(replace(request, plans={}), self._plans[names])

    def _process_events(self) -> None:
        remote = [*self._surveys, *self._streams]
        local_timeout_s = _LOCAL_POLL_S
        if remote:
            timeout_s = _LOCAL_POLL_S if self._num_local_threads else _REMOTE_POLL_S
            ready, _ = ray.wait(remote, num_returns=1, timeout=timeout_s)
            local_timeout_s = 0.0
            for reference in ready:
                if reference in self._surveys:
                    self._finish_survey(reference)
                else:
                    self._read_stream(reference)
            if not ready:
                self._remove_lost_nodes()
        while self._num_local_threads:
            try:
                item = self._local_events.get(block=local_timeout_s > 0, timeout=local_timeout_s)
            except queue.Empty:
                return
            if item is None:
                self._num_local_threads -= 1
            else:
                self._add_event(item)

    def _finish_survey(self, reference: ray.ObjectRef) -> None:
        node_id = self._surveys.pop(reference)
        try:
            self._add_survey(node_id, ray.get(reference))
        except ray.exceptions.RayError as error:
            self._fail_request(self._requests[node_id], error)

    def _read_stream(self, stream: ray.ObjectRefGenerator) -> None:
        try:
            item = ray.get(next(stream))
        except StopIteration:
            self._end_stream(stream)
        except ray.exceptions.RayError as error:
            self._fail_stream(stream, error)
        else:
            if self._is_transfer(stream) and isinstance(item, NodeVenv) and _can_retry(item.error):
                self._retry_transfer(stream, [item.venv], str(item.error), process_died=False)
            else:
                self._add_event(item)

    def _end_stream(self, stream: ray.ObjectRefGenerator) -> None:
        del self._streams[stream]
        if self._broadcast is not None:
            self._broadcast.end_transfer(stream)
            self._start_transfers()

    def _fail_stream(self, stream: ray.ObjectRefGenerator, error: ray.exceptions.RayError) -> None:
        request = self._streams[stream]
        if self._is_transfer(stream) and not self._is_node_lost(request.node_id, error):
            names = [name for name in request.plans if (request.node_id, name) not in self._results]
            self._retry_transfer(stream, names, str(error).partition("\n")[0], process_died=True)
            self._end_stream(stream)
        else:
            self._end_stream(stream)
            self._fail_request(request, error)

    def _remove_lost_nodes(self) -> None:
        if time.monotonic() < self._next_liveness_check:
            return
        self._next_liveness_check = time.monotonic() + _LIVENESS_INTERVAL_S
        alive = {node.node_id for node in alive_nodes()}
        self._surveys = {reference: node_id for reference, node_id in self._surveys.items() if node_id in alive}
        for stream, request in list(self._streams.items()):
            if request.node_id not in alive:
                self._end_stream(stream)
                self._remove_node(request.node_id)

    def _add_survey(self, node_id: str, survey: Survey) -> None:
        for result in survey.done:
            self._results[node_id, result.venv] = result
            self._add_source(result)
        self._pythons.update({(node_id, name): python for name, python in survey.pythons.items()})
        if survey.missing:
            directory = self._directories.setdefault(survey.store_id or node_id, _Directory())
            self._assign(directory, node_id, survey.missing)

    def _assign(self, directory: _Directory, node_id: str, names: Sequence[str]) -> None:
        """Let the first node that lacks a venv build it, and let the others with the same directory wait for it."""
        request = self._requests[node_id]
        to_build: list[str] = []
        to_await: list[str] = []
        for name in names:
            builder = directory.builders.setdefault(request.plans[name].digest, node_id)
            (to_build if builder == node_id else to_await).append(name)
        if to_build:
            self._build_or_receive(request, to_build)
        if to_await:
            directory.waiting[node_id] = to_await
            for name in to_await:
                digest = request.plans[name].digest
                detail = f"for {self._requests[directory.builders[digest]].node}, which has the same venv directory"
                event = Progress(name, digest, "wait", "started", 0.0, detail)
                self._report(NodeProgress(node_id, request.node, event))
            self._end_waits(directory)

    def _build_or_receive(self, request: Request, names: Sequence[str]) -> None:
        """Let a node receive these venvs from another node, or build those that no node has or builds."""
        names_by_key: dict[VenvKey, list[str]] = {}
        for name in names:
            names_by_key.setdefault(self._venv_key(request.node_id, name), []).append(name)
        to_build: list[str] = []
        for key, names_of_key in names_by_key.items():
            sender = self._broadcast.assign(key, request.node_id, names_of_key) if self._broadcast else None
            if sender is None:
                to_build += names_of_key
                continue
            assert self._broadcast is not None
            self._broadcast.prepare(key, request.node_id)
            for name in names_of_key:
                event = Progress(name, key[0], "wait", "started", 0.0, f"for {sender}, which sends it to other nodes")
                self._report(NodeProgress(request.node_id, request.node, event))
        if to_build:
            self._serve(replace(request, plans={name: request.plans[name] for name in to_build}))
        self._start_transfers()

    def _serve(self, request: Request) -> None:
        if request.node_id != self._driver_node:
            self._streams[self._submit(self._serve_task, request)] = request
            return

        def serve() -> None:
            for item in node_task.serve(request, request.plans):
                self._local_events.put(item)
            self._local_events.put(None)

        self._num_local_threads += 1
        threading.Thread(target=serve, name="venvs", daemon=True).start()

    def _add_event(self, item: NodeProgress | NodeVenv) -> None:
        if isinstance(item, NodeProgress):
            self._report(item)
            return
        self._results[item.node_id, item.venv] = item
        self._add_source(item)
        digest = self._requests[item.node_id].plans[item.venv].digest
        for directory in self._directories.values():
            if directory.builders.get(digest) == item.node_id:
                directory.outcomes.setdefault(digest, item)
                self._end_waits(directory)
        if item.error is not None and self._broadcast is not None:
            orphans = self._broadcast.fail_build(self._venv_key(item.node_id, item.venv), item.node_id)
            for node_id, names in orphans.items():
                for name in names:
                    error = SharedFailureError(f"not built: {item.node} builds it for all nodes, and failed.")
                    self._add_event(NodeVenv(name, node_id, self._requests[node_id].node, item.digest, error=error))
        self._start_transfers()

    def _end_waits(self, directory: _Directory) -> None:
        """Let each waiting node check the seals when all its builders are done, or fail with its builder."""
        for node_id, names in list(directory.waiting.items()):
            request = self._requests[node_id]
            outcomes = {
                name: directory.outcomes[digest]
                for name in names
                if (digest := request.plans[name].digest) in directory.outcomes
            }
            if len(outcomes) < len(names):
                continue
            del directory.waiting[node_id]
            for name, outcome in outcomes.items():
                if outcome.error is not None:
                    error = SharedFailureError(
                        f"not built: {outcome.node}, which has the same venv directory, failed to build it."
                    )
                    self._results[node_id, name] = NodeVenv(name, node_id, request.node, outcome.digest, error=error)
            ready = {name: request.plans[name] for name, outcome in outcomes.items() if outcome.error is None}
            if ready:
                self._serve(replace(request, plans=ready, is_awaited=True))

    def _venv_key(self, node_id: str, name: str) -> VenvKey:
        venv_plan = self._requests[node_id].plans[name]
        python = self._pythons.get((node_id, name), python_identity(venv_plan))
        return venv_plan.digest, python if python is not None else node_id

    def _add_source(self, result: NodeVenv) -> None:
        if self._broadcast is not None and result.error is None:
            self._broadcast.add_source(
                self._venv_key(result.node_id, result.venv), result.node_id, result.stable_python
            )

    def _start_transfers(self) -> None:
        if self._broadcast is not None:
            self._streams.update(self._broadcast.start_transfers())

    def _is_transfer(self, stream: Any) -> bool:
        return self._broadcast is not None and self._broadcast.is_transfer(stream)

    def _retry_transfer(
        self, stream: ray.ObjectRefGenerator, names: Sequence[str], reason: str, *, process_died: bool
    ) -> None:
        """Try another source for venvs that were not received; after the last attempt, let the node build them."""
        request = self._streams[stream]
        logger.warning("%s did not reach %s from another node: %s", ", ".join(names), request.node, reason)
        assert self._broadcast is not None
        self._broadcast.fail_transfer(stream, process_died=process_died)
        self._build_or_receive(self._requests[request.node_id], names)

    def _fail_request(self, request: Request, error: ray.exceptions.RayError) -> None:
        """Handle the death of a node's task: an error of all its venvs, unless the node has left the cluster."""
        if self._is_node_lost(request.node_id, error):
            self._remove_node(request.node_id)
            return
        cause = getattr(error, "cause", None) or error
        for name, venv_plan in request.plans.items():
            if (request.node_id, name) not in self._results:
                reason = VenvError(f"the task on the node failed: {type(cause).__name__}: {cause}")
                self._add_event(NodeVenv(name, request.node_id, request.node, venv_plan.digest, error=reason))

    def _is_node_lost(self, node_id: str, error: ray.exceptions.RayError) -> bool:
        return isinstance(error, _NODE_LOST_ERRORS) or node_id not in {node.node_id for node in alive_nodes()}

    def _remove_node(self, lost: str) -> None:
        """Let waiting nodes build what the lost node was building."""
        for directory in self._directories.values():
            directory.waiting.pop(lost, None)
            for digest in [digest for digest, builder in directory.builders.items() if builder == lost]:
                if digest not in directory.outcomes:
                    del directory.builders[digest]
            for node_id, names in list(directory.waiting.items()):
                plans = self._requests[node_id].plans
                if any(plans[name].digest not in directory.builders for name in names):
                    del directory.waiting[node_id]
                    self._assign(directory, node_id, names)
        for node_id, names in self._broadcast.remove_node(lost).items() if self._broadcast is not None else ():
            self._build_or_receive(self._requests[node_id], names)

    def _report(self, event: NodeProgress) -> None:
        if self._progress is not None:
            self._progress(event)


def _can_retry(error: Exception | None) -> bool:
    """Return whether a venv that was not received may still come from another node or be built."""
    return isinstance(error, BroadcastError | VenvBuildError) and not isinstance(error, NoSpaceError)
