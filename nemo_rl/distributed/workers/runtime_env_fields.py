"""The fields of a `runtime_env`: their names, which of them conflict, and the venv that they ask for.

The module needs no Ray, so that a plan of a job can be made without importing it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from nemo_rl.distributed.ray_actor_environment_registry import get_actor_python_env
from nemo_rl.errors import RuntimeEnvError
from nemo_rl.utils.names import did_you_mean
from nemo_rl.venvs import Spec, spec_from_runtime_env

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
COMPATIBLE_FIELDS = ({"pip", "py_executable"}, {"uv", "py_executable"})
# The fields that may be given together with a container.
_CONTAINER_FIELDS = frozenset({"container", "image_uri", "config", "env_vars"})
# Fields that the venv engine, not Ray, carries out.
VENV_FIELDS = ("pip", "uv", "py_executable")


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
            if {first, second} not in COMPATIBLE_FIELDS:
                raise RuntimeEnvError(
                    f"{where}: {first!r} and {second!r} cannot both be given: each decides which packages the worker "
                    "has. Keep one."
                )
    container = next((name for name in ("container", "image_uri") if name in runtime_env), None)
    others = sorted(set(runtime_env) - _CONTAINER_FIELDS)
    if container and others:
        raise RuntimeEnvError(f"{where}: {container!r} and {others[0]!r} cannot both be given: put it into the image.")


def ray_chooses_python(fields: Mapping[str, Any]) -> bool:
    """Return whether a field makes Ray, not the venv engine, choose the Python."""
    return any(name in fields for name in _RAY_CHOOSES_PYTHON)


def named_spec(fqn: str, fields: Mapping[str, Any]) -> tuple[str, Spec]:
    """Return the name and the specification of a class's venv. Not for fields with which Ray chooses the Python.

    Raises:
        UnregisteredActorError: there is no `py_executable`, and none is registered for `fqn`.
        InvalidPyExecutableError, RuntimeEnvError: the value of a field is not accepted.
    """
    spec = spec_from_runtime_env(fields, fields.get("py_executable") or get_actor_python_env(fqn))
    # The name is a link that its latest user moves; groups of one class with different venvs must not share it.
    is_default = not any(name in fields for name in VENV_FIELDS)
    return (fqn if is_default else f"{fqn}-{hashlib.sha256(str(spec).encode()).hexdigest()[:8]}"), spec
