"""The fields of a `runtime_env` that Ray carries out: are they right, and does every node have what they need?

Ray finds most mistakes only when the first worker starts, and some of them (a missing `podman`) not even then: the
worker is simply never there. It also takes local directories, and hooks that are functions, for whole jobs only; here
they are given per worker.
Everything that reaches into Ray's private modules to do this is in this file (checked with ray 2.60).
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.runtime_env import RuntimeEnv

from nemo_rl.distributed.cluster.nodes import alive_nodes, ask_nodes
from nemo_rl.errors import ClusterError, RuntimeEnvError
from nemo_rl.venvs import parse_py_executable, spec_from_runtime_env

# With these, Ray itself decides which Python runs.
_RAY_CHOOSES_PYTHON = ("conda", "container", "image_uri")
# What a node must have on its PATH: any one of them.
_TOOLS = {
    "conda": ("conda", "mamba"),
    "container": ("podman",),
    "image_uri": ("podman",),
    "nsight": ("nsys",),
    "rocprof_sys": ("rocprof-sys-python",),
}
_TOOL_TIMEOUT_S = 60.0


def ray_chooses_python(fields: Mapping[str, Any]) -> bool:
    """Whether a field makes Ray, and not the venv engine, decide which Python runs."""
    return any(name in fields for name in _RAY_CHOOSES_PYTHON)


def check_values(fields: Mapping[str, Any], where: str = "runtime_env") -> None:
    """Check the values of fields whose names are known to go together (`worker_options.checked_runtime_env`).

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


def uploaded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with what is local put into Ray's store, by content: `working_dir`, `py_modules`, the setup hook.

    Raises:
        RuntimeEnvError: one of them is missing or too large.
    """
    result = dict(fields)
    if not any(name in result for name in ("working_dir", "py_modules", "worker_process_setup_hook")):
        result.pop("excludes", None)
        return result
    from ray._private.runtime_env.py_modules import upload_py_modules_if_needed
    from ray._private.runtime_env.setup_hook import upload_worker_process_setup_hook_if_needed
    from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

    node = ray._private.worker._global_node
    assert node is not None, "not connected to Ray"
    options = {"include_gitignore": True, "scratch_dir": node.get_runtime_env_dir_path()}
    try:
        result = dict(upload_py_modules_if_needed(result, **options))
        result = dict(upload_working_dir_if_needed(result, **options))
        if "worker_process_setup_hook" in result:
            result["env_vars"] = dict(result.get("env_vars") or {})
            with _by_value(result["worker_process_setup_hook"]):
                result = dict(upload_worker_process_setup_hook_if_needed(result, ray._private.worker.global_worker))
    except Exception as error:  # Ray raises ValueError, TypeError and RuntimeError here
        raise RuntimeEnvError(f"runtime_env: a directory or hook cannot be shipped: {error}") from error
    result.pop("excludes", None)  # has been carried out
    return result


@contextlib.contextmanager
def _by_value(hook: Any) -> Iterator[None]:
    """Pickle a function with its code: it runs before a worker can find the driver's own modules."""
    module = sys.modules.get(getattr(hook, "__module__", None) or "")
    if not callable(hook) or module is None or module.__name__ == "__main__":
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def require_tools_on_each_node(fields: Mapping[str, Any]) -> None:
    """Check that every node has the programs that these fields need.

    Raises:
        ClusterError: names the field, the program and the nodes.
    """
    needed = {name: _TOOLS[name] for name in fields if name in _TOOLS}
    if not needed:
        return
    programs = sorted({program for names in needed.values() for program in names})
    found: dict[str, list[str]] = {}
    for node, answer in ask_nodes(_found, alive_nodes(), programs, timeout_s=_TOOL_TIMEOUT_S):
        if isinstance(answer, RayError):
            raise ClusterError(
                f"cannot see whether node {node.address} has {', '.join(programs)}: {answer}"
            ) from answer
        found[node.address] = answer
    for name, any_of in needed.items():
        lacking = [address for address, there in found.items() if not set(any_of) & set(there)]
        if lacking:
            raise ClusterError(
                f"runtime_env[{name!r}] needs {' or '.join(any_of)}, which is not on the PATH of {', '.join(lacking)}. "
                "Install it there, or give pip, uv or py_executable instead: they need nothing on the nodes."
            )


def _found(programs: Iterable[str]) -> list[str]:
    return [program for program in programs if shutil.which(program)]
