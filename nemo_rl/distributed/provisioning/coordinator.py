"""One campaign: what is missing on the nodes of the cluster is built, awaited or received, until every node has it.

::

    node answers survey ── has it ──────────────────────────────► source for the others
                        ── shares its directory with another ───► waits for that one, then looks
                        ── lacks it, first of its content ──────► builds
                        ── lacks it, but another has or builds ─► receives from node to node (`venv_spread`)
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
from nemo_rl.distributed.provisioning.broadcast import Content, VenvSpread
from nemo_rl.distributed.provisioning.node_task import Request, Survey, python_identity
from nemo_rl.distributed.provisioning.report import NodeProgress, NodeProgressCallback, NodeVenv, SharedFailureError
from nemo_rl.distributed.provisioning.source_sync import task_options
from nemo_rl.errors import BroadcastError, NoSpaceError, VenvBuildError, VenvError
from nemo_rl.venvs import Progress

logger = logging.getLogger(__name__)

_POLL_S = 0.02
# Ray neither answers Ctrl-C while it waits without a time-out, nor promises to notice every lost node.
_REMOTE_POLL_S = 0.5
_LIVENESS_INTERVAL_S = 5.0
_NODE_IS_GONE = (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError)


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


class Campaign:
    """One call's work on all nodes that need any. Runs in the caller's thread; only the own node's builds do not.

    Args:
        requests: node id -> what it is asked for.
        here: the driver's node.
        progress: called with every event.
        addresses: of all nodes that are alive, by id.
        sources: digest -> node id -> interpreter of the venv there, for nodes that are not asked.
    """

    def __init__(
        self,
        requests: Mapping[str, Request],
        here: str,
        progress: NodeProgressCallback | None,
        *,
        addresses: Mapping[str, str],
        sources: Mapping[str, Mapping[str, str]],
    ) -> None:
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
        self._pythons: dict[tuple[str, str], str | None] = {}
        self._spread = VenvSpread(requests, addresses, here) if settings.VENV_SPREAD.get() == "auto" else None
        self._add_known_sources(sources)
        # Without a runtime_env, so that a node's idle processes can serve it.
        self._survey_task: Any = ray.remote(num_cpus=0, max_retries=0)(node_task.survey_as_task)
        self._serve_task: Any = ray.remote(num_cpus=0, max_retries=0, num_returns="streaming")(node_task.serve_as_task)
        self._next_liveness_check = time.monotonic() + _LIVENESS_INTERVAL_S

    def run(self) -> dict[tuple[str, str], NodeVenv]:
        """(node id, venv name) -> entry; nothing for nodes that left the cluster."""
        try:
            for node_id, request in self._requests.items():
                if node_id != self._here:
                    self._surveys[self._submit(self._survey_task, request)] = node_id
            if self._here in self._requests:
                self._take_survey(self._here, node_task.survey(self._requests[self._here]))
            while self._surveys or self._streams or self._own_threads:
                self._step()
        except BaseException:
            for reference in [*self._surveys, *self._streams]:
                if not self._is_receiving(reference):
                    ray.cancel(reference, force=True)
            if self._spread is not None:
                self._spread.kill()
            raise
        if self._spread is not None:
            self._spread.close()
        return self._found

    def _add_known_sources(self, sources: Mapping[str, Mapping[str, str]]) -> None:
        for request in self._requests.values() if self._spread is not None else ():
            for venv_plan in request.plans.values():
                for node_id, python in sources.get(venv_plan.digest, {}).items():
                    assert self._spread is not None
                    self._spread.add_source((venv_plan.digest, python_identity(venv_plan)), node_id, python)

    def _submit(self, task: Any, request: Request) -> Any:
        names = tuple(request.plans)
        if names not in self._plans:
            self._plans[names] = ray.put(request.plans)
        strategy = NodeAffinitySchedulingStrategy(request.node_id, soft=False)
        options = task.options(
            scheduling_strategy=strategy, name=f"venvs on {request.node}", **task_options(request.node_id)
        )
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
            item = ray.get(next(stream))
        except StopIteration:
            self._end_stream(stream)
        except ray.exceptions.RayError as error:
            self._fail_stream(stream, error)
        else:
            if self._is_receiving(stream) and isinstance(item, NodeVenv) and _may_work_otherwise(item.error):
                self._receive_again(stream, [item.venv], str(item.error), process_died=False)
            else:
                self._take(item)

    def _end_stream(self, stream: ray.ObjectRefGenerator) -> Request:
        request = self._streams.pop(stream)
        if self._spread is not None:
            self._spread.end(stream)
            self._start_receivers()
        return request

    def _fail_stream(self, stream: ray.ObjectRefGenerator, error: ray.exceptions.RayError) -> None:
        request = self._streams[stream]
        if self._is_receiving(stream) and not self._has_left(request.node_id, error):
            names = [name for name in request.plans if (request.node_id, name) not in self._found]
            self._receive_again(stream, names, str(error).partition("\n")[0], process_died=True)
            self._end_stream(stream)
        else:
            self._end_stream(stream)
            self._fail(request, error)

    def _drop_lost_nodes(self) -> None:
        if time.monotonic() < self._next_liveness_check:
            return
        self._next_liveness_check = time.monotonic() + _LIVENESS_INTERVAL_S
        alive = {node.node_id for node in alive_nodes()}
        self._surveys = {reference: node_id for reference, node_id in self._surveys.items() if node_id in alive}
        for stream, request in list(self._streams.items()):
            if request.node_id not in alive:
                self._end_stream(stream)
                self._replace_builder(request.node_id)

    # --- who builds, who waits ---------------------------------------------------------------------------------------

    def _take_survey(self, node_id: str, answer: Survey) -> None:
        for entry in answer.done:
            self._found[node_id, entry.venv] = entry
            self._add_source(entry)
        self._pythons.update({(node_id, name): python for name, python in answer.pythons.items()})
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
            self._build_or_receive(request, mine)
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
        self._add_source(item)
        digest = self._requests[item.node_id].plans[item.venv].digest
        for directory in self._directories.values():
            if directory.builder.get(digest) == item.node_id:
                directory.outcome.setdefault(digest, item)
                self._release(directory)
        if item.error is not None and self._spread is not None:
            for node_id, names in self._spread.give_up(self._content(item.node_id, item.venv), item.node_id).items():
                for name in names:
                    error = SharedFailureError(
                        f"not built: {item.node} failed to, which was to build it for all nodes."
                    )
                    self._take(NodeVenv(name, node_id, self._requests[node_id].node, item.digest, error=error))
        self._start_receivers()

    # --- from node to node -------------------------------------------------------------------------------------------

    def _content(self, node_id: str, name: str) -> Content:
        venv_plan = self._requests[node_id].plans[name]
        python = self._pythons.get((node_id, name), python_identity(venv_plan))
        return venv_plan.digest, python if python is not None else node_id

    def _add_source(self, entry: NodeVenv) -> None:
        if self._spread is not None and entry.error is None:
            self._spread.add_source(self._content(entry.node_id, entry.venv), entry.node_id, entry.stable_python)

    def _build_or_receive(self, request: Request, names: Sequence[str]) -> None:
        """A node, the first of its directory, gets these venvs from others, or builds them where nobody has them."""
        contents: dict[Content, list[str]] = {}
        for name in names:
            contents.setdefault(self._content(request.node_id, name), []).append(name)
        builds: list[str] = []
        for content, own in contents.items():
            giver = self._spread.awaits(content, request.node_id, own) if self._spread is not None else None
            if giver is None:
                builds += own
                continue
            assert self._spread is not None
            self._spread.prepare(content, request.node_id)
            for name in own:
                event = Progress(name, content[0], "wait", "started", 0.0, f"for {giver}, which gives it to the others")
                self._tell(NodeProgress(request.node_id, request.node, event))
        if builds:
            self._serve(replace(request, plans={name: request.plans[name] for name in builds}))
        self._start_receivers()

    def _start_receivers(self) -> None:
        if self._spread is not None:
            self._streams.update(self._spread.start())

    def _is_receiving(self, stream: Any) -> bool:
        return self._spread is not None and self._spread.is_receiving(stream)

    def _receive_again(
        self, stream: ray.ObjectRefGenerator, names: Sequence[str], reason: str, *, process_died: bool
    ) -> None:
        """What did not arrive is tried with another source, and at last built by the node itself."""
        request = self._streams[stream]
        logger.warning("%s did not reach %s from another node: %s", ", ".join(names), request.node, reason)
        assert self._spread is not None
        self._spread.miss(stream, process_died=process_died)
        self._build_or_receive(self._requests[request.node_id], names)

    # --- who builds, who waits: continued ----------------------------------------------------------------------------

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
            for item in node_task.serve(request):
                self._own.put(item)
            self._own.put(None)

        self._own_threads += 1
        threading.Thread(target=pump, name="venvs", daemon=True).start()

    def _fail(self, request: Request, error: ray.exceptions.RayError) -> None:
        """A node's task died. A node that is gone needs no venvs; anything else is an error of all its venvs."""
        if self._has_left(request.node_id, error):
            self._replace_builder(request.node_id)
            return
        cause = getattr(error, "cause", None) or error
        for name, venv_plan in request.plans.items():
            if (request.node_id, name) not in self._found:
                reason = VenvError(f"its task there failed: {type(cause).__name__}: {cause}")
                self._take(NodeVenv(name, request.node_id, request.node, venv_plan.digest, error=reason))

    def _has_left(self, node_id: str, error: ray.exceptions.RayError) -> bool:
        return isinstance(error, _NODE_IS_GONE) or node_id not in {node.node_id for node in alive_nodes()}

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
        for node_id, names in self._spread.lose(gone).items() if self._spread is not None else ():
            self._build_or_receive(self._requests[node_id], names)

    def _tell(self, event: NodeProgress) -> None:
        if self._progress is not None:
            self._progress(event)


def _may_work_otherwise(error: Exception | None) -> bool:
    """Whether a venv that could not be received may still come from elsewhere, or be built."""
    return isinstance(error, BroadcastError | VenvBuildError) and not isinstance(error, NoSpaceError)
