"""What happens on a node when its venvs are made ready. Runs in the driver on its own node, in a Ray task elsewhere.

It needs `nemo_rl.venvs` and nothing else: not ray, not torch.
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
from dataclasses import dataclass, field, replace

from nemo_rl import settings
from nemo_rl.distributed.provisioning.report import NodeProgress, NodeVenv
from nemo_rl.errors import VenvError
from nemo_rl.utils.parent_watch import exit_with_parent
from nemo_rl.venvs import InterpreterSpec, Progress, SealedVenv, Store, VenvPlan, VenvSpec, ensure, find_sealed
from nemo_rl.venvs.building.build import Receive
from nemo_rl.venvs.planning.resolve import python_of

# For how long another node's new files may stay unseen: NFS keeps what it knows about a directory for a while.
_VISIBILITY_TIMEOUT_S = 60.0
_STORE_ID_FILE = ".id"
_OWN_PREFIXES = ("NEMO_RL_", "NRL_")


@dataclass(frozen=True)
class Request:
    """What a node is asked for.

    Attributes:
        node_id, node: who is asked: Ray's id, and the address for people.
        plans: venv name -> what it holds.
        job: unique name of the job.
        force: rebuild what this job has not built.
        variables: the driver's, for building; see `driver_variables`; empty in the driver itself.
        is_awaited: another node has just built these in the same directory.
    """

    node_id: str
    node: str
    plans: dict[str, VenvPlan]
    job: str
    force: bool = False
    variables: dict[str, str] = field(default_factory=dict, repr=False)
    is_awaited: bool = False

    def label(self) -> str:
        return f"{self.node} ({socket.gethostname()})"


@dataclass(frozen=True)
class Survey:
    """What a node has.

    Attributes:
        store_id: equal on nodes that share a venv directory; None where it cannot be written.
        done: the venvs that need nothing more: ready, or hopeless.
        missing: names of those that have to be built.
        pythons: name of a missing venv -> what Python and platform it gets here; nodes where that is equal can give the
            same venv to one another. None: this node cannot say.
    """

    store_id: str | None
    done: tuple[NodeVenv, ...]
    missing: tuple[str, ...]
    pythons: dict[str, str | None] = field(default_factory=dict)


def driver_variables() -> dict[str, str]:
    """The driver's variables that decide how a node builds: this project's, uv's and the proxies'."""
    proxies = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    return {
        name: value
        for name, value in settings.snapshot().items()
        if name.startswith((*_OWN_PREFIXES, "UV_")) or name.lower() in proxies
    }


def survey(request: Request) -> Survey:
    """Find out what this node has, and name what is ready. Builds nothing."""
    with settings.exported(variables_here(request.variables)):
        store = Store.default()
        done: list[NodeVenv] = []
        missing: list[str] = []
        for venv, plan in request.plans.items():
            if isinstance(plan.spec, InterpreterSpec) and plan.is_interpreter:
                done.append(_existing(request, venv, plan))
            elif is_ready(plan, store, request):
                done.append(_ensured(request, venv, plan, store))
            else:
                missing.append(venv)
        pythons = {venv: _python_here(request.plans[venv]) for venv in missing}
        return Survey(_store_id(store) if missing else None, tuple(done), tuple(missing), pythons)


def serve(request: Request, receive: Receive | None = None) -> Iterator[NodeProgress | NodeVenv]:
    """Make the venvs ready on this node, all at once; yields events as they happen and one `NodeVenv` for each.

    With `receive` they come from there and nothing is built.
    """
    with settings.exported(variables_here(request.variables)):
        store = Store.default()
        if request.is_awaited:
            _await_seals(request, store)
        told: queue.SimpleQueue[NodeProgress | NodeVenv] = queue.SimpleQueue()
        by_digest: dict[str, list[str]] = {}
        for venv, plan in request.plans.items():
            by_digest.setdefault(plan.digest, []).append(venv)

        def build(venvs: list[str]) -> None:
            for venv in venvs:
                told.put(_ensured(request, venv, request.plans[venv], store, told, receive))

        for venvs in by_digest.values():
            # Daemons: Ctrl-C in the driver must not wait for them. uv dies with the thread that started it.
            threading.Thread(target=build, args=(venvs,), name=f"venv {venvs[0]}", daemon=True).start()
        left = len(request.plans)
        while left:
            item = told.get()
            left -= isinstance(item, NodeVenv)
            yield item


def survey_as_task(request: Request, plans: dict[str, VenvPlan]) -> Survey:
    """`survey` in a Ray process. `plans` belong into the request; they travel apart, once for all nodes."""
    return survey(replace(request, plans=plans))


def serve_as_task(request: Request, plans: dict[str, VenvPlan]) -> Iterator[NodeProgress | NodeVenv]:
    """`serve` in a Ray process."""
    with ending_with_raylet():
        yield from serve(replace(request, plans=plans))


@contextlib.contextmanager
def ending_with_raylet() -> Iterator[None]:
    """End this Ray process if its raylet ends while the block runs, so that it cannot hold a build lock any longer."""
    stopped = exit_with_parent()
    try:
        yield
    finally:
        stopped.set()


def python_identity(plan: VenvPlan) -> str:
    """What Python and platform a plan was made for, as in `Survey.pythons`."""
    return json.dumps(plan.python.identity(), sort_keys=True)


def _python_here(plan: VenvPlan) -> str | None:
    if not isinstance(plan.spec, VenvSpec):
        return python_identity(plan)  # laid over an interpreter that was looked at while planning
    try:
        return json.dumps(python_of(plan.spec)[0].identity(), sort_keys=True)
    except VenvError:
        return None  # will be told when the venv is to be made


def is_ready(plan: VenvPlan, store: Store, request: Request) -> bool:
    """Whether a store holds what a request asks for, so that `ensure` would do nothing."""
    sealed = find_sealed(plan.digest, store)
    if sealed is None or sealed.manifest is None:
        return False
    return not request.force or sealed.manifest.job_id == request.job


def _existing(request: Request, venv: str, plan: VenvPlan) -> NodeVenv:
    path = str(plan.spec.path) if isinstance(plan.spec, InterpreterSpec) else ""
    error = None
    if not os.access(path, os.X_OK):
        error = VenvError(f"the interpreter {path} does not exist there, or cannot be run.")
    return NodeVenv(venv, request.node_id, request.label(), plan.digest, path, path, error=error)


def _ensured(
    request: Request,
    venv: str,
    plan: VenvPlan,
    store: Store,
    told: queue.SimpleQueue[NodeProgress | NodeVenv] | None = None,
    receive: Receive | None = None,
) -> NodeVenv:
    seconds: dict[str, float] = {}

    def report(event: Progress) -> None:
        if event.state in ("done", "failed"):
            seconds[event.phase] = round(seconds.get(event.phase, 0.0) + event.seconds, 4)
        if told is not None:
            told.put(NodeProgress(request.node_id, request.label(), event))

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
    except Exception as error:  # goes to the driver, whatever it is
        shown = error if isinstance(error, VenvError) else VenvError(f"{type(error).__name__}: {error}")
        return NodeVenv(venv, request.node_id, request.label(), plan.digest, seconds=seconds, error=shown)
    return _ready_entry(request, venv, sealed, seconds)


def _ready_entry(request: Request, venv: str, sealed: SealedVenv, seconds: dict[str, float]) -> NodeVenv:
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


def _await_seals(request: Request, store: Store) -> None:
    """Wait until what another node has sealed can be seen here. After the time-out, `ensure` decides."""
    deadline = time.monotonic() + _VISIBILITY_TIMEOUT_S
    while time.monotonic() < deadline:
        if all(is_ready(plan, store, request) for plan in request.plans.values()):
            return
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            os.listdir(store.directory)  # makes NFS look again


def _store_id(store: Store) -> str | None:
    """An id that the nodes which share this directory agree on."""
    path = store.directory / _STORE_ID_FILE
    try:
        store.directory.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            temporary = path.with_name(f"{_STORE_ID_FILE}.{os.getpid()}.{os.urandom(8).hex()}")
            temporary.write_text(os.urandom(16).hex())
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)  # unlike a rename, never replaces another node's
            temporary.unlink()
        return path.read_text()
    except OSError:
        return None


def variables_here(variables: Mapping[str, str]) -> dict[str, str]:
    """What the driver's variables mean on this node: uv's and the proxies' only fill gaps, a node may need its own."""
    own = settings.snapshot()
    return {name: value for name, value in variables.items() if name.startswith(_OWN_PREFIXES) or name not in own}
