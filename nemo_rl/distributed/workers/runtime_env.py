"""The options of a worker: Ray's actor options and `runtime_env` fields.

Options are merged by precedence, from lowest to highest: the class's `@ray.remote(...)`; the builder's; the call's; the
result of the class's `configure_worker`; the placement that the builder sets. A `runtime_env` is merged per field, its
`env_vars` per variable.

Fields that Ray carries out are checked here first. Ray reports most mistakes only when the first worker starts, and
some of them never: a worker whose node lacks `podman` simply does not appear. Ray also accepts local directories, and
hooks that are functions, for whole jobs only; here they can be given per worker.
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
from nemo_rl.errors import ClusterError, RuntimeEnvError, WorkerStartError
from nemo_rl.secrets import mask_secrets
from nemo_rl.utils.names import did_you_mean
from nemo_rl.venvs import parse_py_executable, spec_from_runtime_env

logger = logging.getLogger(__name__)

RUNTIME_ENV_FIELDS = frozenset(
    {
        "pip",
        "uv",
        "conda",
        "env_vars",
        "working_dir",
        "py_modules",
        "excludes",
        "worker_process_setup_hook",
        "nsight",
        "rocprof_sys",
        "image_uri",
        "container",
        "config",
        "py_executable",
        "java_jars",
    }
)
# `RuntimeEnv(nsight=...)` is a mapping that holds the field under this name.
_RAY_SPELLING = {"_nsight": "nsight", "_rocprof_sys": "rocprof_sys"}
# With these fields Ray, not the venv engine, chooses the Python.
_RAY_CHOOSES_PYTHON = ("conda", "container", "image_uri")
# Each of these fields chooses the Python, so any two conflict, except that `py_executable` is the base of pip and uv.
PYTHON_FIELDS = (*_RAY_CHOOSES_PYTHON, "pip", "uv", "py_executable")
_COMPATIBLE = ({"pip", "py_executable"}, {"uv", "py_executable"})
# The fields that may be given together with a container.
_CONTAINER_FIELDS = frozenset({"container", "image_uri", "config", "env_vars"})
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


def checked_runtime_env(
    runtime_env: Mapping[str, Any] | None, where: str = "runtime_env", py_executable: str | None = None
) -> dict[str, Any]:
    """Return a `runtime_env` as a plain dict without fields that are None.

    Args:
        runtime_env: a mapping or a Ray `RuntimeEnv`.
        where: what messages call it.
        py_executable: becomes the field `py_executable`.

    Raises:
        RuntimeEnvError: a field is unknown (names the nearest), `env_vars` is malformed, or two fields conflict.
    """
    if not isinstance(runtime_env, Mapping | None):
        raise RuntimeEnvError(f"{where} must be a mapping or a ray RuntimeEnv, not {type(runtime_env).__name__}")
    fields: dict[str, Any] = {}
    for key, value in (runtime_env or {}).items():
        name = _RAY_SPELLING.get(key, key)
        if name.startswith("_") or value is None:
            continue  # internal to Ray
        if name not in RUNTIME_ENV_FIELDS:
            hint = did_you_mean(str(name), RUNTIME_ENV_FIELDS)
            raise RuntimeEnvError(f"{where} has an unknown field {name!r}.{hint} Known: {sorted(RUNTIME_ENV_FIELDS)}")
        fields[name] = value
    if "env_vars" in fields:
        fields["env_vars"] = checked_env_vars(fields["env_vars"], f"{where}['env_vars']")
    if py_executable is not None and fields.setdefault("py_executable", py_executable) != py_executable:
        raise RuntimeEnvError(
            f"py_executable={py_executable!r} and {where}['py_executable']={fields['py_executable']!r} cannot both be "
            "given. Keep one."
        )
    check_conflicts(fields, where)
    return fields


def checked_env_vars(env_vars: Mapping[str, str] | None, where: str = "env_vars") -> dict[str, str]:
    """Return a copy of `env_vars`. Raises `RuntimeEnvError`, without the value, unless all values are strings."""
    if not isinstance(env_vars, Mapping | None):
        raise RuntimeEnvError(f"{where} must map names to strings, not be a {type(env_vars).__name__}")
    for name, value in (env_vars or {}).items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise RuntimeEnvError(f"{where}[{name!r}] must be a string, not {type(value).__name__}: write str(...)")
    return dict(env_vars or {})


def check_conflicts(runtime_env: Mapping[str, Any], where: str = "runtime_env") -> None:
    """Raise `RuntimeEnvError`, naming both fields, if two fields cannot be given together."""
    given = [name for name in PYTHON_FIELDS if runtime_env.get(name) is not None]
    for index, first in enumerate(given):
        for second in given[index + 1 :]:
            if {first, second} not in _COMPATIBLE:
                raise RuntimeEnvError(
                    f"{where}: {first!r} and {second!r} cannot both be given: each decides which packages the worker "
                    "has. Keep one."
                )
    container = next((name for name in ("container", "image_uri") if name in runtime_env), None)
    others = sorted(set(runtime_env) - _CONTAINER_FIELDS)
    if container and others:
        raise RuntimeEnvError(f"{where}: {container!r} and {others[0]!r} cannot both be given: put it into the image.")


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


def ray_chooses_python(fields: Mapping[str, Any]) -> bool:
    """Return whether a field makes Ray, not the venv engine, choose the Python."""
    return any(name in fields for name in _RAY_CHOOSES_PYTHON)


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
            if any(name != lower and {name, lower} not in _COMPATIBLE for name in choices):
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
