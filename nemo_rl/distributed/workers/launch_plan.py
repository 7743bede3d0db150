"""The launch plan of a worker group: everything that its workers share, decided before any of them starts.

A `LaunchPlan` holds the venv, the `runtime_env` and the described class. All workers of a group have the *same*
`runtime_env`: Ray starts and reuses processes by its hash, so it must not contain a variable that differs per worker,
such as RANK. The worker host sets those instead. It also sets secrets, because Ray logs every `runtime_env`.
"""

from __future__ import annotations

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
from nemo_rl.distributed.provisioning.source_sync import distribute_source, search_path
from nemo_rl.distributed.workers import host as worker_host
from nemo_rl.distributed.workers.class_description import (
    ClassDescription,
    cache_path,
    load_description,
    save_description,
)
from nemo_rl.distributed.workers.runtime_env import (
    ConfiguredWorker,
    merged_runtime_env,
    needs_programs,
    require_programs_on_each_node,
    upload_local_files,
)
from nemo_rl.distributed.workers.runtime_env_fields import (
    PYTHON_FIELDS,
    VENV_FIELDS,
    check_conflicts,
    checked_runtime_env,
    named_spec,
    ray_chooses_python,
)
from nemo_rl.errors import WorkerStartError
from nemo_rl.secrets import is_secret_variable
from nemo_rl.venvs import UNSET_IN_VENV, DriverVersions, InterpreterSpec, Spec, VenvPlan
from nemo_rl.venvs import plan as plan_venv
from nemo_rl.venvs.storage.manifest import BrokenManifestError, read_manifest


@ray.remote(num_cpus=0, max_restarts=0)
class IsolatedWorkerInitializer(worker_host.ClassInspector):
    """Imports a worker's module inside the worker's venv, for a driver that lacks the module's packages.

    It describes the class and evaluates `configure_worker`. It takes no CPU and is killed once it has answered, so that
    a job that fits never waits for its idle initializers.
    """


@dataclass(frozen=True)
class WorkerPython:
    """The Python that the workers of a group run in.

    Attributes:
        name, spec: its name and specification in the venv engine; empty and None if Ray creates it (conda, containers).
        python: path of the interpreter, equal on all nodes; None if Ray creates it.
        digest: of the venv; None for an interpreter outside the engine's venvs.
        activation: variables that activate the venv, see `activation`.
        node_ids: the nodes where it is ready.
    """

    name: str = ""
    spec: Spec | None = None
    python: str | None = None
    digest: str | None = None
    activation: dict[str, str] = field(default_factory=dict)
    node_ids: frozenset[str] = frozenset()

    @property
    def expected(self) -> dict[str, str | None]:
        """What each worker's attestation must contain; None for a value that is not known in advance."""
        return {"venv_digest": self.digest, "ray": ray.__version__}


@dataclass(frozen=True)
class LaunchPlan:
    """Holds what the workers of one group share.

    Attributes:
        fqn: the worker class.
        python: the Python that the workers run in.
        fields: the `runtime_env` as merged from the class, the builder and the call.
        runtime_env: the `runtime_env` for Ray.
        host_env_vars: variables that the worker host sets before it imports the worker's module: secrets, and values
            that Ray would modify.
        description: of the class.
        actor_class: the Ray actor class of the description.
        given: the fields of builder and call alone.
        description_path: the file that caches the description.
    """

    fqn: str
    python: WorkerPython
    fields: dict[str, Any] = field(repr=False)
    runtime_env: dict[str, Any] = field(repr=False)
    host_env_vars: dict[str, str] = field(repr=False)
    description: ClassDescription
    actor_class: Any = field(repr=False)
    given: dict[str, Any] = field(default_factory=dict, repr=False)
    description_path: Path | None = None

    @property
    def secrets(self) -> tuple[str, ...]:
        """Values that no message may show."""
        return tuple(value for name, value in self.host_env_vars.items() if value and is_secret_variable(name, value))

    def configure(self, calls: list[dict[str, Any]]) -> list[ConfiguredWorker]:
        """Evaluate the class's `configure_worker(**call)` for each of `calls`, in the worker's venv.

        For a class without this method, no process is started and nothing is configured.
        """
        method = self.description.configure_worker
        if method is None:
            return [ConfiguredWorker()] * len(calls)
        # A static method needs only the module of the class that defines it, which may be cheaper to import.
        fqn = method.fqn if method.is_static else self.fqn
        results = _ask_initializer(self.fqn, self.runtime_env, self.host_env_vars, "configure", fqn, calls)
        return [ConfiguredWorker.from_result(result, self.fqn) for result in results]

    def ready_on(self, node_ids: Iterable[str]) -> LaunchPlan:
        """Return the plan with source and venv ready on these nodes too, some of which may have joined later.

        Raises:
            NodeVenvError: the venv cannot be built on one of them.
        """
        path_before = search_path()
        if self.python.spec is not None:
            for node_id in sorted(set(node_ids) - self.python.node_ids):
                ensure_venv_on_node(node_id, self.python.spec, self.python.name)
        return self if search_path() == path_before else self.with_fields(self.fields)

    def with_description(self, description: ClassDescription) -> LaunchPlan:
        """Return the plan for a class that differs from its cached description, and cache the new one."""
        if self.description_path is not None:
            save_description(self.description_path, description)
        if description.ray_options.get("runtime_env") != self.description.ray_options.get("runtime_env"):
            return plan_launch(self.fqn, self.given)
        return replace(self, description=description, actor_class=description.actor_class())

    def refreshed(self) -> LaunchPlan:
        """Return the plan with the class as it is now. Raises `WorkerStartError` if its venv cannot import it."""
        return self.with_description(_describe(self.fqn, self.runtime_env, self.host_env_vars))

    def with_fields(self, fields: Mapping[str, Any]) -> LaunchPlan:
        """Return the plan with other `runtime_env` fields, for a worker whose `configure_worker` overrides some."""
        python = self.python
        _require_programs({name: value for name, value in fields.items() if name not in self.fields})
        if any(fields.get(name) != self.fields.get(name) for name in PYTHON_FIELDS):
            python = prepare_python(self.fqn, fields)
        runtime_env, host_env_vars = ray_runtime_env(python, fields)
        return replace(self, python=python, fields=dict(fields), runtime_env=runtime_env, host_env_vars=host_env_vars)


def plan_launch(fqn: str, fields: Mapping[str, Any]) -> LaunchPlan:
    """Plan the launch of a group. Blocks until the venv is ready and the class is described.

    Args:
        fqn: the worker class.
        fields: the `runtime_env` of builder, call and group, merged and checked.

    Raises:
        UnregisteredActorError: no py_executable is registered for `fqn`.
        InvalidPyExecutableError: the py_executable is not supported.
        RuntimeEnvError: two fields conflict.
        NodeVenvError: the venv cannot be made ready on some node.
        WorkerStartError: the worker's module cannot be imported in its venv.
    """
    check_conflicts(fields)
    python = prepare_python(fqn, fields)
    runtime_env, host_env_vars = ray_runtime_env(python, fields)
    path = _description_path(fqn, python, runtime_env)
    description = load_description(path)
    if description is None:
        description = _describe(fqn, runtime_env, host_env_vars)
        save_description(path, description)
    actor_class = description.actor_class()
    plan = LaunchPlan(
        fqn, python, dict(fields), runtime_env, host_env_vars, description, actor_class, dict(fields), path
    )
    class_fields = description.ray_options.get("runtime_env")
    if not class_fields:
        return plan
    return plan.with_fields(merged_runtime_env(checked_runtime_env(class_fields, f"runtime_env of {fqn}"), fields))


# --- the Python -------------------------------------------------------------------------------------------------------


def prepare_python(fqn: str, fields: Mapping[str, Any]) -> WorkerPython:
    """Make the Python of `fields`, or else of the registry, ready on every node."""
    _require_programs(fields)
    if ray_chooses_python(fields):
        distribute_source(alive_nodes())
        return WorkerPython()
    name, spec = named_spec(fqn, fields)
    return prepare_pythons({name: spec})[name]


def prepare_child_python(fqn: str, fields: Mapping[str, Any]) -> WorkerPython:
    """Make a Python ready on every node that a worker starts as its child.

    Unlike the Python of a worker, it needs no ray and may have another version than the driver's.

    Args:
        fqn: the class or function that runs in it; names the venv.
        fields: a checked `runtime_env` with `py_executable`, which `pip` and `uv` add packages to.

    Raises:
        InvalidPyExecutableError, NodeVenvError, VenvError: see `plan_launch`.
    """
    name, spec = named_spec(fqn, fields)
    return prepare_pythons({name: plan_venv(spec, expected=DriverVersions.any())})[name]


def prepare_venvs_of(requests: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Make the venvs of several classes ready on every node, in parallel.

    Args:
        requests: each class with the `runtime_env` of its builder. Those whose Python Ray creates are skipped.

    Raises:
        UnregisteredActorError, InvalidPyExecutableError, RuntimeEnvError, NodeVenvError, VenvError: see `plan_launch`.
    """
    venvs = dict(named_spec(fqn, fields) for fqn, fields in requests if not ray_chooses_python(fields))
    ensure_venvs_on_each_node(venvs)


def _require_programs(fields: Mapping[str, Any]) -> None:
    """Raise `ClusterError` before anything is built if a node lacks a program that a field needs, such as `nsys`."""
    if needs_programs(fields):
        distribute_source(alive_nodes())  # the check runs this package's code on every node
        require_programs_on_each_node(fields)


def prepare_pythons(
    venvs: Mapping[str, Spec | VenvPlan], progress: NodeProgressCallback | None = None
) -> dict[str, WorkerPython]:
    """Make several Pythons ready on every node, in parallel. Raises what `ensure_venvs_on_each_node` raises."""
    report = ensure_venvs_on_each_node(venvs, progress=progress)
    pythons = {}
    for name, venv in venvs.items():
        spec = venv.spec if isinstance(venv, VenvPlan) else venv
        python = report.python(name)
        if isinstance(spec, InterpreterSpec) and not spec.requirements:
            digest = _digest_of_interpreter(python)
        else:
            # Nodes of different platforms have different digests.
            digest = report.digest(name) if report.agrees(name) else None
        node_ids = frozenset(entry.node_id for entry in report.of(name))
        pythons[name] = WorkerPython(name, spec, python, digest, activation(python), node_ids)
    return pythons


def _digest_of_interpreter(python: str) -> str | None:
    """Return the digest of the engine's venv that `python` belongs to, if it belongs to one."""
    try:
        return read_manifest(Path(python).parent.parent).digest
    except BrokenManifestError:
        return None


def activation(python: str) -> dict[str, str]:
    """Return variables for a `runtime_env` that activate the venv of `python` for workers, children and nested actors.

    `PATH` is only the venv's part; each node adds its own. With the driver's Python, `PYTHONPATH` stays, because it is
    how the driver finds its modules.
    """
    bin_dir = os.path.dirname(python)
    root = os.path.dirname(bin_dir)
    unset = [] if python == sys.executable else UNSET_IN_VENV
    venv = {"VIRTUAL_ENV": root} if os.path.exists(os.path.join(root, "pyvenv.cfg")) else {}
    return {**venv, "PATH": bin_dir, "PYTHONNOUSERSITE": "1", **dict.fromkeys(unset, "")}


def ray_runtime_env(python: WorkerPython, fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the `runtime_env` for Ray, and the variables that the worker host sets."""
    fields = upload_local_files(fields)
    result = {name: value for name, value in fields.items() if name != "env_vars"}
    if python.python is not None:
        result = {name: value for name, value in result.items() if name not in VENV_FIELDS}
        result["py_executable"] = python.python
    given = fields.get("env_vars") or {}
    by_ray = {name: value for name, value in given.items() if not is_secret_variable(name, value)}
    by_host = {name: value for name, value in given.items() if is_secret_variable(name, value)}
    for name, value in (settings.project_variables() | settings.forwarded()).items():
        if name in given:
            continue
        # Ray writes every runtime_env to its logs, and expands `$NAME` in the values.
        target = by_host if is_secret_variable(name, value) or "$" in value else by_ray
        target[name] = value
    active = dict(python.activation)
    source = search_path()
    if active:
        active["PATH"] = f"{active['PATH']}:{by_ray.get('PATH', '${PATH}')}"
        active.update({name: by_ray[name] for name in UNSET_IN_VENV if name in by_ray})
    if source:
        inherited = active.get("PYTHONPATH", by_ray.get("PYTHONPATH", settings.snapshot().get("PYTHONPATH", "")))
        active["PYTHONPATH"] = os.pathsep.join([*source, *([inherited] if inherited else [])])
    # Without this, Ray would start the worker's children with `uv run` again.
    result["env_vars"] = {**by_ray, **active, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    return result, by_host


def make_actor_runtime_env(fqn: str) -> dict[str, Any]:
    """Make the Python of a registered class ready on every node, and return a `runtime_env` for a plain Ray actor.

    `RayWorkerGroup` needs no such call. The actor's class must be importable here. Secrets among the driver's variables
    are left out, because Ray logs every `runtime_env`.

    Raises what `plan_launch` raises for the Python of a class.

    Example::

        actor = MyActor.options(runtime_env=make_actor_runtime_env("my_package.MyActor")).remote()
    """
    runtime_env, _ = ray_runtime_env(prepare_python(fqn, {}), {})
    return runtime_env


# --- the class --------------------------------------------------------------------------------------------------------


def _description_path(fqn: str, python: WorkerPython, runtime_env: Mapping[str, Any]) -> Path:
    return cache_path(fqn, python.digest or python.python or "", runtime_env["env_vars"].get("PYTHONPATH", ""))


def _describe(fqn: str, runtime_env: Mapping[str, Any], host_env_vars: dict[str, str]) -> ClassDescription:
    return ClassDescription.from_plain(_ask_initializer(fqn, runtime_env, host_env_vars, "describe", fqn))


def _ask_initializer(
    fqn: str, runtime_env: Mapping[str, Any], host_env_vars: dict[str, str], method: str, *args: Any
) -> Any:
    """Call a method of an `IsolatedWorkerInitializer` that runs in the worker's venv."""
    actor_class: Any = IsolatedWorkerInitializer
    initializer = actor_class.options(runtime_env=dict(runtime_env)).remote(host_env_vars)
    try:
        return ray.get(getattr(initializer, method).remote(*args), timeout=settings.WORKER_START_TIMEOUT_S.get())
    except RayError as error:
        raise WorkerStartError(
            f"{fqn} cannot be loaded in its venv ({runtime_env.get('py_executable', 'created by Ray')}): {error}"
        ) from error
    finally:
        ray.kill(initializer)
