"""A node's side of provisioning: survey its venvs and make them ready.

It runs in the driver's process on the driver's node and in a Ray task on other nodes. It uses neither ray nor torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nemo_rl import settings
from nemo_rl.distributed.provisioning.report import NodeProgress, NodeVenv
from nemo_rl.errors import VenvError
from nemo_rl.utils.files import write_atomically
from nemo_rl.utils.parent_watch import exit_with_parent
from nemo_rl.venvs import InterpreterSpec, Progress, Store, VenvPlan, VenvSpec, ensure, find_sealed
from nemo_rl.venvs.building.build import Receive
from nemo_rl.venvs.planning.resolve import python_of

# How long new files of another node may be invisible here: NFS caches directories.
_VISIBILITY_TIMEOUT_S = 60.0
_STORE_ID_FILE = ".id"
_PROJECT_PREFIXES = ("NEMO_RL_", "NRL_")


@dataclass(frozen=True)
class Request:
    """Asks a node for venvs.

    Attributes:
        node_id: Ray's id of the node.
        node: address of the node.
        plans: venv name -> plan.
        job: unique name of the job.
        force: rebuild venvs that this job has not built.
        variables: the driver's variables for builds, see `driver_variables`; empty on the driver's node.
        is_awaited: whether another node has just built these venvs in the same directory.
    """

    node_id: str
    node: str
    plans: dict[str, VenvPlan]
    job: str
    force: bool = False
    variables: dict[str, str] = field(default_factory=dict, repr=False)
    is_awaited: bool = False

    def label(self) -> str:
        """Return address and host name, for messages."""
        return f"{self.node} ({socket.gethostname()})"


@dataclass(frozen=True)
class Survey:
    """Lists the venvs that a node has and lacks.

    Attributes:
        store_id: equal on nodes that share a venv directory; None if the directory is not writable.
        done: results of venvs that are ready or can never be.
        missing: names of the venvs that must be built or received.
        pythons: name of a missing venv -> Python and platform that it gets on this node; nodes with equal values can
            send the venv to each other. None if there is no such Python on this node.
    """

    store_id: str | None
    done: tuple[NodeVenv, ...]
    missing: tuple[str, ...]
    pythons: dict[str, str | None] = field(default_factory=dict)


def driver_variables() -> dict[str, str]:
    """Return the driver's variables that affect builds on nodes: those of this project, of uv and of proxies.

    The driver's project is one of them: the node's working directory, or its environment, may name another one.
    """
    proxies = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    return settings.project_variables() | {
        name: value
        for name, value in settings.snapshot().items()
        if name.startswith((*_PROJECT_PREFIXES, "UV_")) or name.lower() in proxies
    }


def survey(request: Request, plans: Mapping[str, VenvPlan]) -> Survey:
    """Find the requested venvs on this node, and point their names to those that are ready. Builds nothing.

    Args:
        request: its plans are not used: as an argument, `plans` is one object in Ray's store for all nodes.
        plans: venv name -> plan.
    """
    with settings.exported(node_variables(request.variables)):
        store = Store.default()
        done: list[NodeVenv] = []
        missing: list[str] = []
        for venv, plan in plans.items():
            if isinstance(plan.spec, InterpreterSpec) and plan.is_interpreter:
                done.append(_check_interpreter(request, venv, plan.digest, plan.spec.path))
            elif is_ready(plan, store, request):
                done.append(_ensure(request, venv, plan, store))
            else:
                missing.append(venv)
        pythons = {venv: _local_python(plans[venv]) for venv in missing}
        return Survey(_store_id(store) if missing else None, tuple(done), tuple(missing), pythons)


def serve(
    request: Request, plans: Mapping[str, VenvPlan], receive: Receive | None = None
) -> Iterator[NodeProgress | NodeVenv]:
    """Make the venvs ready on this node, in parallel; yield events and one `NodeVenv` per venv.

    Args:
        request, plans: see `survey`.
        receive: fills in the venvs from another node instead of building them.
    """
    with settings.exported(node_variables(request.variables)):
        store = Store.default()
        if request.is_awaited:
            _await_seals(request, plans, store)
        events: queue.SimpleQueue[NodeProgress | NodeVenv] = queue.SimpleQueue()
        by_digest: dict[str, list[str]] = {}
        for venv, plan in plans.items():
            by_digest.setdefault(plan.digest, []).append(venv)

        def build(venvs: list[str]) -> None:
            for venv in venvs:
                events.put(_ensure(request, venv, plans[venv], store, events, receive))

        for venvs in by_digest.values():
            # Daemon threads, so that Ctrl-C in the driver does not wait for them. uv ends with the thread that runs it.
            threading.Thread(target=build, args=(venvs,), name=f"venv {venvs[0]}", daemon=True).start()
        num_pending = len(plans)
        while num_pending:
            item = events.get()
            num_pending -= isinstance(item, NodeVenv)
            yield item


def serve_as_task(request: Request, plans: dict[str, VenvPlan]) -> Iterator[NodeProgress | NodeVenv]:
    """Run `serve` in a Ray task, which ends with its raylet."""
    with ending_with_raylet():
        yield from serve(request, plans)


@contextlib.contextmanager
def ending_with_raylet() -> Iterator[None]:
    """End this Ray process if its raylet ends while the block runs, so that it does not keep holding build locks."""
    stopped = exit_with_parent()
    try:
        yield
    finally:
        stopped.set()


def python_identity(plan: VenvPlan) -> str:
    """Return the Python and platform of a plan, in the format of `Survey.pythons`."""
    return json.dumps(plan.python.identity(), sort_keys=True)


def _local_python(plan: VenvPlan) -> str | None:
    if not isinstance(plan.spec, VenvSpec):
        return python_identity(plan)  # the base interpreter was queried for the plan
    try:
        return json.dumps(python_of(plan.spec)[0].identity(), sort_keys=True)
    except VenvError:
        return None  # `ensure` will report the error


def is_ready(plan: VenvPlan, store: Store, request: Request) -> bool:
    """Return whether a store holds the venv that a request asks for, so that `ensure` has nothing to do."""
    sealed = find_sealed(plan.digest, store)
    if sealed is None or sealed.manifest is None:
        return False
    return not request.force or sealed.manifest.job_id == request.job


def _check_interpreter(request: Request, venv: str, digest: str, path: str) -> NodeVenv:
    error = None
    if not os.access(path, os.X_OK):
        error = VenvError(f"the interpreter {path} does not exist on the node or is not executable.")
    return NodeVenv(venv, request.node_id, request.label(), digest, path, path, error=error)


def _ensure(
    request: Request,
    venv: str,
    plan: VenvPlan,
    store: Store,
    events: queue.SimpleQueue[NodeProgress | NodeVenv] | None = None,
    receive: Receive | None = None,
) -> NodeVenv:
    seconds: dict[str, float] = {}

    def report(event: Progress) -> None:
        if event.state in ("done", "failed"):
            seconds[event.phase] = round(seconds.get(event.phase, 0.0) + event.seconds, 4)
        if events is not None:
            events.put(NodeProgress(request.node_id, request.label(), event))

    try:
        sealed = ensure(
            plan,
            venv,
            force_rebuild=request.force,
            job_id=request.job,
            progress=report,
            store=store,
            receive=receive,
        )
    except Exception as error:  # the driver reports it
        venv_error = error if isinstance(error, VenvError) else VenvError(f"{type(error).__name__}: {error}")
        return NodeVenv(venv, request.node_id, request.label(), plan.digest, seconds=seconds, error=venv_error)
    return NodeVenv(
        venv,
        request.node_id,
        request.label(),
        sealed.digest,
        sealed.python,
        str(sealed.stable_path / "bin" / "python"),
        sealed.built,
        seconds,
    )


def _await_seals(request: Request, plans: Mapping[str, VenvPlan], store: Store) -> None:
    """Wait until the venvs that another node has sealed are visible here. After a timeout, `ensure` decides."""
    deadline = time.monotonic() + _VISIBILITY_TIMEOUT_S
    while time.monotonic() < deadline:
        if all(is_ready(plan, store, request) for plan in plans.values()):
            return
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            os.listdir(store.directory)  # makes NFS update its cache of the directory


def _store_id(store: Store) -> str | None:
    """Return an id that all nodes with this directory have in common; None if the directory is not writable."""
    path = store.directory / _STORE_ID_FILE
    try:
        store.create()
        if not path.exists():
            temporary = path.with_name(f"{_STORE_ID_FILE}.{os.getpid()}.{os.urandom(8).hex()}")
            write_atomically(temporary, os.urandom(16).hex())
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)  # unlike a rename, this never replaces the file of another node
            temporary.unlink()
        return path.read_text()
    except OSError:
        return None


def node_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the driver's variables that apply on this node.

    Variables of this project always do. Those of uv and of proxies do unless the node sets them itself.
    """
    local = settings.snapshot()
    return {name: value for name, value in variables.items() if name.startswith(_PROJECT_PREFIXES) or name not in local}
