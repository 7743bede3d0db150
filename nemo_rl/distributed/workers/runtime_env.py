"""The options of a worker: Ray's actor options and `runtime_env` fields, merged by precedence.

From lowest to highest: the class's `@ray.remote(...)`; what the builder was given; what the call was given; what the
class's `configure_worker` returns; the placement that the builder sets. A `runtime_env` is merged per field, its
`env_vars` per variable.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nemo_rl import settings
from nemo_rl.errors import RuntimeEnvError, WorkerStartError
from nemo_rl.utils.names import did_you_mean

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
# Each of these decides which Python runs, so no two of them hold together (`py_executable` is the base of pip and uv).
CHOOSE_PYTHON = ("conda", "container", "image_uri", "pip", "uv", "py_executable")
_HOLD_TOGETHER = ({"pip", "py_executable"}, {"uv", "py_executable"})
# What a container takes with it.
_WITH_CONTAINER = frozenset({"container", "image_uri", "config", "env_vars"})
# Read by the dynamic linker, the interpreter, Ray or CUDA before a worker's first line of Python runs: only the
# runtime_env is early enough for these. All others are set by the worker's host.
_EARLY_PREFIXES = ("LD_", "PYTHON", "RAY_", "CUDA_", "MALLOC_", "ASAN_", "GLIBC_")

Configured = tuple[dict[str, Any] | None, dict[str, str] | None, dict[str, Any] | None, dict[str, Any] | None]


@dataclass(frozen=True)
class WorkerOptions:
    """Everything that one worker is started with.

    Attributes:
        ray: Ray's actor options, without `runtime_env`.
        runtime_env: fields as the user spells them.
        init_kwargs: constructor arguments that `configure_worker` adds or replaces.
    """

    ray: dict[str, Any] = field(default_factory=dict)
    runtime_env: dict[str, Any] = field(default_factory=dict)
    init_kwargs: dict[str, Any] = field(default_factory=dict)


def checked_runtime_env(runtime_env: Mapping[str, Any] | None, where: str = "runtime_env") -> dict[str, Any]:
    """A plain copy of a `runtime_env`, without fields that are None, once its fields are known to hold together.

    Raises:
        RuntimeEnvError: an unknown field (names the nearest), a malformed `env_vars`, or two fields that clash.
    """
    if runtime_env is None:
        return {}
    if not isinstance(runtime_env, Mapping):
        raise RuntimeEnvError(f"{where} must be a mapping or a ray RuntimeEnv, not {type(runtime_env).__name__}")
    result: dict[str, Any] = {}
    for key, value in runtime_env.items():
        name = _RAY_SPELLING.get(key, key)
        if name.startswith("_") or value is None:
            continue  # Ray's own bookkeeping
        if name not in RUNTIME_ENV_FIELDS:
            hint = did_you_mean(str(name), RUNTIME_ENV_FIELDS)
            raise RuntimeEnvError(f"{where} has an unknown field {name!r}.{hint} Known: {sorted(RUNTIME_ENV_FIELDS)}")
        result[name] = value
    if "env_vars" in result:
        result["env_vars"] = checked_env_vars(result["env_vars"], f"{where}['env_vars']")
    refuse_clashes(result, where)
    return result


def checked_env_vars(env_vars: Mapping[str, str] | None, where: str = "env_vars") -> dict[str, str]:
    """A copy of `env_vars`. Raises `RuntimeEnvError` for anything but texts (the value itself is not shown)."""
    if not isinstance(env_vars, Mapping | None):
        raise RuntimeEnvError(f"{where} must map names to texts, not be a {type(env_vars).__name__}")
    for name, value in (env_vars or {}).items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise RuntimeEnvError(f"{where}[{name!r}] must be a text, not {type(value).__name__}: write str(...)")
    return dict(env_vars or {})


def refuse_clashes(runtime_env: Mapping[str, Any], where: str = "runtime_env") -> None:
    """Raise `RuntimeEnvError` that names two fields which cannot both hold."""
    given = [name for name in CHOOSE_PYTHON if runtime_env.get(name) is not None]
    for index, first in enumerate(given):
        for second in given[index + 1 :]:
            if {first, second} not in _HOLD_TOGETHER:
                raise RuntimeEnvError(
                    f"{where}: {first!r} and {second!r} cannot both be given: each decides which packages the worker "
                    "has. Keep one."
                )
    container = next((name for name in ("container", "image_uri") if name in runtime_env), None)
    others = sorted(set(runtime_env) - _WITH_CONTAINER)
    if container and others:
        raise RuntimeEnvError(f"{where}: {container!r} and {others[0]!r} cannot both be given: put it into the image.")


def merged_runtime_env(*layers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Merge per field, `env_vars` per variable; later layers win. Nothing of the layers is shared or changed.

    A layer that says which Python runs in one way (`conda`, `pip`, ...) replaces a lower layer's way: a call with
    `conda` over a class that has `pip` means `conda`.
    """
    result: dict[str, Any] = {}
    env_vars: dict[str, str] = {}
    for layer in layers:
        fields = dict(layer or {})
        env_vars.update(fields.pop("env_vars", None) or {})
        chosen = {name for name in CHOOSE_PYTHON if name in fields}
        for lower in [name for name in CHOOSE_PYTHON if name in result]:
            if any(name != lower and {name, lower} not in _HOLD_TOGETHER for name in chosen):
                del result[lower]
        result.update(fields)
    if env_vars:
        result["env_vars"] = env_vars
    return result


def with_configured(options: WorkerOptions, configured: Configured, fqn: str) -> WorkerOptions:
    """`options` with what `configure_worker` returned on top. An option of the user's that it overrides is logged."""
    resources, env_vars, init_kwargs, overrides = _checked_configured(configured, fqn)
    overrides = merged_runtime_env(overrides, {"env_vars": env_vars})
    _log_overrides(fqn, options.ray, resources)
    _log_overrides(fqn, options.runtime_env.get("env_vars", {}), overrides.get("env_vars", {}), "env_vars.")
    _log_overrides(fqn, options.runtime_env, {k: v for k, v in overrides.items() if k != "env_vars"}, "runtime_env.")
    return WorkerOptions(
        ray={**options.ray, **resources},
        runtime_env=merged_runtime_env(options.runtime_env, overrides),
        init_kwargs={**options.init_kwargs, **init_kwargs},
    )


def _checked_configured(
    configured: Configured, fqn: str
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any], dict[str, Any]]:
    what = f"{fqn}.configure_worker"
    if not isinstance(configured, tuple | list) or len(configured) != 4:
        raise WorkerStartError(
            f"{what} must return (resources, env_vars, init_kwargs, runtime_env_overrides), not a "
            f"{type(configured).__name__}"
        )
    for name, value in zip(("resources", "env_vars", "init_kwargs", "runtime_env_overrides"), configured):
        if not isinstance(value, Mapping | None):
            raise WorkerStartError(f"{what}: {name} must be a dict or None, not {type(value).__name__}")
    resources, env_vars, init_kwargs, overrides = configured
    return (
        dict(resources or {}),
        checked_env_vars(env_vars, f"{what}: env_vars"),
        dict(init_kwargs or {}),
        checked_runtime_env(overrides, f"{what}: runtime_env_overrides"),
    )


def _log_overrides(fqn: str, given: Mapping[str, Any], replaced: Mapping[str, Any], prefix: str = "") -> None:
    for name, value in replaced.items():
        if name in given and given[name] != value:
            shown = (settings.MASK, settings.MASK) if settings.is_secret(name) else (given[name], value)
            logger.warning("%s.configure_worker overrides %s%s=%r with %r", fqn, prefix, name, *shown)


def scheduled(options: Mapping[str, Any], placement_group: PlacementGroup | None, bundle_index: int) -> dict[str, Any]:
    """Ray's actor options with the placement that the builder sets.

    Children of the worker are *not* captured into its placement group, unless `placement_group_capture_child_tasks` is
    given: the worker holds its whole share of the bundle, so a child that needs a CPU would wait there for ever.
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


def is_early(name: str) -> bool:
    """Whether a variable must be in the process's environment before its first line of Python runs."""
    return name.startswith(_EARLY_PREFIXES)
