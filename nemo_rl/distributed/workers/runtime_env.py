"""The options of a worker: Ray's actor options and `runtime_env` fields.

Options are merged by precedence, from lowest to highest: the class's `@ray.remote(...)`; the builder's; the call's; the
result of the class's `configure_worker`; the placement that the builder sets. A `runtime_env` is merged per field, its
`env_vars` per variable.

Values of fields that Ray carries out are checked here first. Ray reports most mistakes only when the first worker
starts, and some of them never: a worker whose node lacks `podman` simply does not appear. Ray also accepts local
directories, and hooks that are functions, for whole jobs only; here they can be given per worker.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray import cloudpickle
from ray.exceptions import RayError
from ray.runtime_env import RuntimeEnv
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nemo_rl import settings
from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.provisioning.remote_calls import ask_nodes
from nemo_rl.distributed.ray_private import upload_directories, upload_setup_hook
from nemo_rl.distributed.workers.runtime_env_fields import (
    COMPATIBLE_FIELDS,
    PYTHON_FIELDS,
    checked_env_vars,
    checked_runtime_env,
    ray_chooses_python,
)
from nemo_rl.errors import ClusterError, RuntimeEnvError, WorkerStartError
from nemo_rl.secrets import mask_secrets
from nemo_rl.venvs import parse_py_executable, spec_from_runtime_env

logger = logging.getLogger(__name__)

# Variables that the dynamic linker, the interpreter, Ray or CUDA reads before the first line of a worker's Python runs.
# They must be in the runtime_env; the worker host sets all others.
_EARLY_PREFIXES = ("LD_", "PYTHON", "RAY_", "CUDA_", "MALLOC_", "ASAN_", "GLIBC_")
# Programs of which a node must have at least one on its PATH.
_PROGRAMS = {
    "conda": ("conda", "mamba"),
    "container": ("podman",),
    "image_uri": ("podman",),
    "nsight": ("nsys",),
    "rocprof_sys": ("rocprof-sys-python",),
}
_PROGRAM_TIMEOUT_S = 60.0


# --- checking ---------------------------------------------------------------------------------------------------------


def check_values(fields: Mapping[str, Any], where: str = "runtime_env") -> None:
    """Check the values of fields that `checked_runtime_env` has returned.

    Raises:
        RuntimeEnvError: a list of requirements, a py_executable, a path or a type is wrong; names the field.
    """
    try:
        if not ray_chooses_python(fields):
            spec_from_runtime_env(fields, fields.get("py_executable") or sys.executable)
    except RuntimeEnvError as error:
        raise RuntimeEnvError(f"{where}: {error}") from error
    if "py_executable" in fields:
        parse_py_executable(fields["py_executable"])
    for name, value in fields.items():
        if name in ("pip", "uv", "py_executable"):
            continue
        try:
            RuntimeEnv(**{name: value})
        except Exception as error:  # Ray raises ValueError, TypeError, jsonschema's errors and plain Exceptions
            raise RuntimeEnvError(f"{where}[{name!r}]: {str(error).splitlines()[0]}") from error


def is_early(name: str) -> bool:
    """Return whether a variable must be set before the first line of the worker's Python runs."""
    return name.startswith(_EARLY_PREFIXES)


def needs_programs(fields: Mapping[str, Any]) -> bool:
    """Return whether a field needs a program on the nodes."""
    return any(name in _PROGRAMS for name in fields)


def require_programs_on_each_node(fields: Mapping[str, Any]) -> None:
    """Check that every node has the programs that these fields need, such as `podman` for a container.

    Raises:
        ClusterError: a program is missing; names the field, the program and the nodes.
    """
    needed = {name: _PROGRAMS[name] for name in fields if name in _PROGRAMS}
    if not needed:
        return
    programs = sorted({program for alternatives in needed.values() for program in alternatives})
    installed: dict[str, list[str]] = {}
    for node, answer in ask_nodes(_installed_programs, alive_nodes(), programs, timeout_s=_PROGRAM_TIMEOUT_S):
        if isinstance(answer, RayError):
            raise ClusterError(
                f"cannot determine whether node {node.address} has {', '.join(programs)}: {answer}"
            ) from answer
        installed[node.address] = answer
    for name, alternatives in needed.items():
        lacking = [address for address, names in installed.items() if not set(alternatives) & set(names)]
        if lacking:
            profiles = name in ("nsight", "rocprof_sys")
            remedy = (
                "remove the field" if profiles else "use pip, uv or py_executable, which need no program on the nodes"
            )
            raise ClusterError(
                f"runtime_env[{name!r}] needs {' or '.join(alternatives)}, which is not on the PATH of "
                f"{', '.join(lacking)}. Install it there, or {remedy}."
            )


def _installed_programs(programs: Iterable[str]) -> list[str]:
    return [program for program in programs if shutil.which(program)]


# --- uploading --------------------------------------------------------------------------------------------------------


def upload_local_files(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return `fields` with local content in Ray's store, by digest: `working_dir`, `py_modules`, the setup hook.

    Raises:
        RuntimeEnvError: a directory is missing or too large, or the hook cannot be pickled.
    """
    result = dict(fields)
    if any(name in result for name in ("working_dir", "py_modules", "worker_process_setup_hook")):
        try:
            result = upload_directories(result)
            if "worker_process_setup_hook" in result:
                result["env_vars"] = dict(result.get("env_vars") or {})
                with _pickled_by_value(result["worker_process_setup_hook"]):
                    result = upload_setup_hook(result)
        except Exception as error:  # Ray raises ValueError, TypeError and RuntimeError here
            raise RuntimeEnvError(f"runtime_env: a directory or hook cannot be uploaded: {error}") from error
    result.pop("excludes", None)  # has been applied to the upload
    return result


@contextlib.contextmanager
def _pickled_by_value(hook: Any) -> Iterator[None]:
    """Pickle a hook with its code, because it runs before the worker can import the driver's modules."""
    module = sys.modules.get(getattr(hook, "__module__", None) or "")
    if not callable(hook) or module is None or module.__name__ == "__main__":
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


# --- merging ----------------------------------------------------------------------------------------------------------


def merged_runtime_env(*layers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Merge layers per field, and `env_vars` per variable; later layers win. The layers are not changed.

    A layer that chooses the Python (`conda`, `pip`, ...) replaces the choice of a lower layer: a call with `conda` over
    a class with `pip` uses `conda`.
    """
    result: dict[str, Any] = {}
    env_vars: dict[str, str] = {}
    for layer in layers:
        fields = dict(layer or {})
        env_vars.update(fields.pop("env_vars", None) or {})
        choices = {name for name in PYTHON_FIELDS if name in fields}
        for lower in [name for name in PYTHON_FIELDS if name in result]:
            if any(name != lower and {name, lower} not in COMPATIBLE_FIELDS for name in choices):
                del result[lower]
        result.update(fields)
    if env_vars:
        result["env_vars"] = env_vars
    return result


@dataclass(frozen=True)
class ConfiguredWorker:
    """The checked result of a class's `configure_worker`.

    Attributes:
        resources: Ray's actor options.
        init_kwargs: constructor arguments to add or replace.
        runtime_env: fields, the variables in `env_vars` included.
    """

    resources: dict[str, Any] = field(default_factory=dict)
    init_kwargs: dict[str, Any] = field(default_factory=dict)
    runtime_env: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_result(cls, result: Any, fqn: str) -> ConfiguredWorker:
        """Check `(resources, env_vars, init_kwargs, runtime_env_overrides)`, each a dict or None.

        Raises:
            WorkerStartError: the result has another form.
            RuntimeEnvError: a variable or a field is wrong.
        """
        what = f"{fqn}.configure_worker"
        if not isinstance(result, tuple | list) or len(result) != 4:
            raise WorkerStartError(
                f"{what} must return (resources, env_vars, init_kwargs, runtime_env_overrides), not a "
                f"{type(result).__name__}"
            )
        for name, value in zip(("resources", "env_vars", "init_kwargs", "runtime_env_overrides"), result):
            if not isinstance(value, Mapping | None):
                raise WorkerStartError(f"{what}: {name} must be a dict or None, not {type(value).__name__}")
        resources, env_vars, init_kwargs, overrides = result
        return cls(
            resources=dict(resources or {}),
            init_kwargs=dict(init_kwargs or {}),
            runtime_env=merged_runtime_env(
                checked_runtime_env(overrides, f"{what}: runtime_env_overrides"),
                {"env_vars": checked_env_vars(env_vars, f"{what}: env_vars")},
            ),
        )


@dataclass(frozen=True)
class WorkerOptions:
    """The options that one worker is started with.

    Attributes:
        ray: Ray's actor options, without `runtime_env`.
        runtime_env: fields as the user writes them.
        init_kwargs: constructor arguments that `configure_worker` adds or replaces.
    """

    ray: dict[str, Any] = field(default_factory=dict)
    runtime_env: dict[str, Any] = field(default_factory=dict)
    init_kwargs: dict[str, Any] = field(default_factory=dict)

    def with_configured(self, configured: ConfiguredWorker, fqn: str) -> WorkerOptions:
        """Return the options with the result of `configure_worker` on top, and log each option that it overrides."""
        env_vars = configured.runtime_env.get("env_vars", {})
        fields = {name: value for name, value in configured.runtime_env.items() if name != "env_vars"}
        _log_overrides(fqn, self.ray, configured.resources)
        _log_overrides(fqn, self.runtime_env.get("env_vars", {}), env_vars, "env_vars.")
        _log_overrides(fqn, self.runtime_env, fields, "runtime_env.")
        return WorkerOptions(
            ray={**self.ray, **configured.resources},
            runtime_env=merged_runtime_env(self.runtime_env, configured.runtime_env),
            init_kwargs={**self.init_kwargs, **configured.init_kwargs},
        )


def _log_overrides(fqn: str, given: Mapping[str, Any], replaced: Mapping[str, Any], prefix: str = "") -> None:
    for name, value in replaced.items():
        if name in given and given[name] != value:
            shown = [settings.MASK if settings.is_secret(name) else mask_secrets(v) for v in (given[name], value)]
            logger.warning("%s.configure_worker overrides %s%s=%r with %r", fqn, prefix, name, *shown)


def scheduled(options: Mapping[str, Any], placement_group: PlacementGroup | None, bundle_index: int) -> dict[str, Any]:
    """Return Ray's actor options with the placement of the worker.

    Children of the worker are *not* captured into its placement group, unless `placement_group_capture_child_tasks` is
    given: the worker holds its whole share of the bundle, so a child that needs a CPU would wait forever.
    """
    result = dict(options)
    capture = bool(result.pop("placement_group_capture_child_tasks", False))
    if placement_group is not None:
        result["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            placement_group=placement_group,
            placement_group_bundle_index=bundle_index,
            placement_group_capture_child_tasks=capture,
        )
    return result
