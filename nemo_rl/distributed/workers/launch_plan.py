"""Everything that the workers of one group share, decided once before any of them starts.

A `LaunchPlan` holds the venv, the shared `runtime_env` and the described class. All workers of a group have the *same*
`runtime_env`: Ray starts and reuses processes by its hash, so a variable that differs per worker (RANK) does not belong
there. Those are set by the worker's host instead, and so are secrets, because Ray logs every `runtime_env`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from nemo_rl import settings
from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.node_venvs import NodeProgressCallback, ensure_venv_on_node, ensure_venvs_on_each_node
from nemo_rl.distributed.provisioning.source_sync import bring_source, search_path
from nemo_rl.distributed.ray_actor_environment_registry import get_actor_python_env
from nemo_rl.distributed.runtime_env_fields import ray_chooses_python, require_tools_on_each_node, uploaded
from nemo_rl.distributed.workers import host as worker_host
from nemo_rl.distributed.workers.class_description import (
    ClassDescription,
    cache_path,
    load_description,
    save_description,
)
from nemo_rl.distributed.workers.runtime_env import (
    CHOOSE_PYTHON,
    Configured,
    checked_runtime_env,
    merged_runtime_env,
    refuse_clashes,
)
from nemo_rl.errors import WorkerStartError
from nemo_rl.venvs import UNSET_IN_VENV, InterpreterSpec, Spec, VenvPlan, spec_from_runtime_env
from nemo_rl.venvs.storage.manifest import BrokenManifestError, read_manifest

logger = logging.getLogger(__name__)

# Fields that are carried out by the venv engine, not by Ray.
_CARRIED_OUT_HERE = ("pip", "uv", "py_executable")


@ray.remote(num_cpus=0, max_restarts=0)
class IsolatedWorkerInitializer(worker_host.ClassInspector):
    """Imports a worker's module inside the worker's venv, on behalf of a driver that does not have its packages.

    It says what the class looks like, and evaluates `configure_worker`. It takes no CPU, and is killed as soon as it
    has answered: a job that fits must never wait for its own idle initializers.
    """


@dataclass(frozen=True)
class WorkerPython:
    """The Python that a group's workers run with.

    Attributes:
        name, spec: what the venv engine knows it by; None where Ray makes it (conda, containers).
        python: path of the interpreter, the same on every node; None where Ray makes it (conda, containers).
        digest: of the venv; None for an interpreter that is not in a venv of the engine.
        activation: variables that activate the venv, see `activation`.
        node_ids: where it is known to be ready.
    """

    name: str = ""
    spec: Spec | None = None
    python: str | None = None
    digest: str | None = None
    activation: dict[str, str] = field(default_factory=dict)
    node_ids: frozenset[str] = frozenset()

    @property
    def expected(self) -> dict[str, str | None]:
        """What each worker's attestation must say; None for what cannot be known beforehand."""
        return {"venv_digest": self.digest, "ray": ray.__version__}


@dataclass(frozen=True)
class LaunchPlan:
    """What the workers of one group share.

    Attributes:
        fqn: the worker class.
        python: see `WorkerPython`.
        fields: the `runtime_env` as merged from the class, the builder and the call.
        runtime_env: for Ray.
        host_env_vars: set by the worker's host, before the worker's module is imported: secrets, and values that Ray
            would change on the way.
        description: of the class.
        actor_class: of that description.
    """

    fqn: str
    python: WorkerPython
    fields: dict[str, Any] = field(repr=False)
    runtime_env: dict[str, Any] = field(repr=False)
    host_env_vars: dict[str, str] = field(repr=False)
    description: ClassDescription
    actor_class: Any = field(repr=False)

    def serving(self, node_ids: Iterable[str]) -> LaunchPlan:
        """The plan for these nodes too: those that joined later get the source and the venv. Raises `NodeVenvError`."""
        had = search_path()
        if self.python.spec is not None:
            for node_id in sorted(set(node_ids) - self.python.node_ids):
                ensure_venv_on_node(node_id, self.python.spec, self.python.name)
        return self if search_path() == had else self.with_fields(self.fields)

    @property
    def secrets(self) -> tuple[str, ...]:
        """Texts that no message may show."""
        return tuple(value for name, value in self.host_env_vars.items() if settings.is_secret(name) and value)

    def redescribed(self, description: ClassDescription) -> LaunchPlan:
        """The plan for a class that turned out to differ from its kept description."""
        save_description(_description_path(self.fqn, self.python, self.runtime_env), description)
        return replace(self, description=description, actor_class=description.actor_class())

    def described_anew(self) -> LaunchPlan:
        """The plan with the class as it is now. Raises `WorkerStartError` when it cannot be imported in its venv."""
        plain = _ask_initializer(self.fqn, self.runtime_env, self.host_env_vars, "describe", self.fqn)
        return self.redescribed(ClassDescription.from_plain(plain))

    def with_fields(self, fields: Mapping[str, Any]) -> LaunchPlan:
        """The plan with other `runtime_env` fields: of a worker whose `configure_worker` overrides some."""
        python = self.python
        if _choice(fields) != _choice(self.fields):
            python = worker_python(self.fqn, fields)
        runtime_env, host_env_vars = ray_runtime_env(python, fields)
        return replace(self, python=python, fields=dict(fields), runtime_env=runtime_env, host_env_vars=host_env_vars)


def plan_launch(fqn: str, fields: Mapping[str, Any]) -> LaunchPlan:
    """Decide what all workers of a group share. Blocks until the venv is ready and the class described.

    Args:
        fields: the `runtime_env` that builder, call and group give, merged and checked.

    Raises:
        UnregisteredActorError, InvalidPyExecutableError: there is no Python for `fqn`.
        RuntimeEnvError: fields that clash.
        NodeVenvError: the venv could not be made ready on some node.
        WorkerStartError: the worker's module cannot be imported in its venv.
    """
    refuse_clashes(fields)
    python = worker_python(fqn, fields)
    runtime_env, host_env_vars = ray_runtime_env(python, fields)
    description = _description(fqn, python, runtime_env, host_env_vars)
    plan = LaunchPlan(
        fqn, python, dict(fields), runtime_env, host_env_vars, description, actor_class=description.actor_class()
    )
    of_class = description.ray_options.get("runtime_env")
    if not of_class:
        return plan
    return plan.with_fields(merged_runtime_env(checked_runtime_env(of_class, f"runtime_env of {fqn}"), fields))


def configure_workers(plan: LaunchPlan, calls: list[dict[str, Any]]) -> list[Configured]:
    """What the class's `configure_worker` returns for each of `calls`, evaluated in the worker's venv.

    Without such a method nothing is started, and the answer is four times None for each.
    """
    configure = plan.description.configure_worker
    if configure is None:
        return [(None, None, None, None)] * len(calls)
    # A static method needs no more than the module of the class that defines it, which may be a light one.
    fqn = configure.fqn if configure.is_static else plan.fqn
    return _ask_initializer(plan.fqn, plan.runtime_env, plan.host_env_vars, "configure", fqn, calls)


def worker_python(fqn: str, fields: Mapping[str, Any]) -> WorkerPython:
    """Make the Python ready that `fields`, or else the registry, asks for, on every node."""
    if ray_chooses_python(fields):
        bring_source(alive_nodes())
        require_tools_on_each_node(fields)
        return WorkerPython()
    chosen = fields.get("py_executable")
    spec = spec_from_runtime_env(fields, chosen or get_actor_python_env(fqn))
    # The name is a link that its latest user moves; groups of one class with different venvs must not share it.
    is_default = not any(name in fields for name in _CARRIED_OUT_HERE)
    name = fqn if is_default else f"{fqn}-{hashlib.sha256(str(spec).encode()).hexdigest()[:8]}"
    return ready_pythons({name: spec})[name]


def ready_pythons(
    venvs: Mapping[str, Spec | VenvPlan], progress: NodeProgressCallback | None = None
) -> dict[str, WorkerPython]:
    """Make several Pythons ready on every node, all at once. Raises what `ensure_venvs_on_each_node` does."""
    report = ensure_venvs_on_each_node(venvs, progress=progress)
    result = {}
    for name, venv in venvs.items():
        spec = venv.spec if isinstance(venv, VenvPlan) else venv
        python = report.python(name)
        if isinstance(spec, InterpreterSpec) and not spec.requirements:
            digest = _digest_of_interpreter(python)
        else:
            digest = report.digest(name) if report.agrees(name) else None  # nodes of several platforms: one digest each
        nodes = frozenset(entry.node_id for entry in report.of(name))
        result[name] = WorkerPython(name, spec, python, digest, activation(python), nodes)
    return result


def _digest_of_interpreter(python: str) -> str | None:
    """A path may still lead into one of the engine's venvs."""
    try:
        return read_manifest(Path(python).parent.parent).digest
    except BrokenManifestError:
        return None


def activation(python: str) -> dict[str, str]:
    """Variables that activate the venv of `python` in a `runtime_env`: for workers, their children and nested actors.

    `PATH` is the venv's part only; the rest is each node's own. With the driver's Python, `PYTHONPATH` stays: it is how
    the driver found its own modules.
    """
    bin_dir = os.path.dirname(python)
    root = os.path.dirname(bin_dir)
    unset = [] if python == sys.executable else UNSET_IN_VENV
    venv = {"VIRTUAL_ENV": root} if os.path.exists(os.path.join(root, "pyvenv.cfg")) else {}
    return {**venv, "PATH": bin_dir, "PYTHONNOUSERSITE": "1", **dict.fromkeys(unset, "")}


def _choice(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in CHOOSE_PYTHON if name in fields}


def ray_runtime_env(python: WorkerPython, fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The `runtime_env` that Ray gets, and the variables that the worker sets by itself."""
    fields = uploaded(fields)
    result = {name: value for name, value in fields.items() if name != "env_vars"}
    if python.python is not None:
        result = {name: value for name, value in result.items() if name not in _CARRIED_OUT_HERE}
        result["py_executable"] = python.python
    given = fields.get("env_vars") or {}
    shared = {name: value for name, value in given.items() if not settings.is_secret(name)}
    by_host = {name: value for name, value in given.items() if settings.is_secret(name)}
    for name, value in settings.forwarded().items():
        if name in given:
            continue
        # Ray writes every runtime_env into its logs, and replaces `$NAME` in the values.
        target = by_host if settings.is_secret(name) or "$" in value else shared
        target[name] = value
    active = dict(python.activation)
    source = search_path()
    if active:
        active["PATH"] = f"{active['PATH']}:{shared.get('PATH', '${PATH}')}"
        active.update({name: shared[name] for name in UNSET_IN_VENV if name in shared})
    if source:
        below = active.get("PYTHONPATH", shared.get("PYTHONPATH", settings.snapshot().get("PYTHONPATH", "")))
        active["PYTHONPATH"] = os.pathsep.join([*source, *([below] if below else [])])
    # Without this, Ray would start the worker's own children with `uv run` once more.
    result["env_vars"] = {**shared, **active, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    return result, by_host


def _description(
    fqn: str, python: WorkerPython, runtime_env: Mapping[str, Any], host_env_vars: dict[str, str]
) -> ClassDescription:
    path = _description_path(fqn, python, runtime_env)
    description = load_description(path)
    if description is None:
        plain = _ask_initializer(fqn, runtime_env, host_env_vars, "describe", fqn)
        description = ClassDescription.from_plain(plain)
        save_description(path, description)
    return description


def _description_path(fqn: str, python: WorkerPython, runtime_env: Mapping[str, Any]) -> Any:
    search_path = runtime_env["env_vars"].get("PYTHONPATH", "")
    return cache_path(fqn, python.digest or python.python or "", search_path)


def _ask_initializer(
    fqn: str, runtime_env: Mapping[str, Any], host_env_vars: dict[str, str], method: str, *args: Any
) -> Any:
    actor_class: Any = IsolatedWorkerInitializer
    initializer = actor_class.options(runtime_env=dict(runtime_env)).remote(host_env_vars)
    try:
        return ray.get(getattr(initializer, method).remote(*args), timeout=settings.WORKER_START_TIMEOUT_S.get())
    except RayError as error:
        raise WorkerStartError(
            f"{fqn} cannot be loaded in its venv ({runtime_env.get('py_executable', 'made by Ray')}): {error}"
        ) from error
    finally:
        ray.kill(initializer)
