"""Ray's private API is used in one module, and has the shape that this module expects.

A failure here after an update of Ray names what moved. Adapt `nemo_rl/distributed/ray_private.py` (or, for the last
tests, the script that is named), then the table below.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

import nemo_rl
from nemo_rl.distributed import ray_private
from nemo_rl.errors import ClusterError

PACKAGE = Path(nemo_rl.__file__).parent
PRIVATE_MODULES = ("ray._private", "ray._raylet")

# Module, name in it, parameters in the order of the signature; None for what is no function.
USED: list[tuple[str, str, list[str] | None]] = [
    ("ray._private.worker", "_global_node", None),
    ("ray._private.worker", "global_worker", None),
    ("ray._private.node", "Node.session_name", None),
    ("ray._private.node", "Node.gcs_address", None),
    ("ray._private.node", "Node.webui_url", None),
    ("ray._private.node", "Node.get_session_dir_path", ["self"]),
    ("ray._private.node", "Node.get_runtime_env_dir_path", ["self"]),
    ("ray._private.services", "get_node", ["gcs_address", "node_id"]),
    (
        "ray._private.node",
        "Node.start_raylet",
        [
            "self",
            "plasma_directory",
            "fallback_directory",
            "object_store_memory",
            "use_valgrind",
            "use_profiler",
        ],
    ),
    ("ray._raylet", "DASHBOARD_AGENT_LISTEN_PORT_NAME", None),
    ("ray._raylet", "persist_port", None),
    ("ray._private.state", "available_resources_per_node", []),
    ("ray._private.state", "actors", ["actor_id", "job_id", "actor_state_name"]),
    ("ray._private.ray_constants", "PROCESS_TYPE_GCS_SERVER", None),
    ("ray._private.ray_constants", "RAY_ENABLE_UV_RUN_RUNTIME_ENV", None),
    ("ray._private.ray_constants", "ENABLE_RAY_CLUSTER", None),
    ("ray._private.ray_constants", "SETUP_WORKER_FILENAME", None),
    ("ray._raylet", "Config.initialize", ["config_list"]),
    (
        "ray._private.runtime_env.py_modules",
        "upload_py_modules_if_needed",
        ["runtime_env", "include_gitignore", "scratch_dir", "logger", "upload_fn"],
    ),
    (
        "ray._private.runtime_env.working_dir",
        "upload_working_dir_if_needed",
        ["runtime_env", "include_gitignore", "scratch_dir", "logger", "upload_fn"],
    ),
    (
        "ray._private.runtime_env.setup_hook",
        "upload_worker_process_setup_hook_if_needed",
        ["runtime_env", "worker"],
    ),
    # What cluster/setup_worker.py carries out in place of Ray's script.
    (
        "ray._private.runtime_env.context",
        "RuntimeEnvContext",
        ["command_prefix", "env_vars", "py_executable", "override_worker_entrypoint", "java_jars"],
    ),
    ("ray._private.runtime_env.context", "RuntimeEnvContext.exec_worker", ["self", "passthrough_args", "language"]),
]
# Constants that are assigned at run time: the module that reads each must read it then, through `ray_constants`.
READ_AT_RUN_TIME = [
    ("ray._private.worker", "RAY_ENABLE_UV_RUN_RUNTIME_ENV"),
    ("ray._private.services", "ENABLE_RAY_CLUSTER"),
    ("ray._private.services", "SETUP_WORKER_FILENAME"),
]


def resolve(module: str, name: str) -> Any:
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(value, part), f"Ray {ray.__version__} has no {module}.{name}; see the top of this file"
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(("module", "name", "parameters"), USED, ids=[f"{module}.{name}" for module, name, _ in USED])
def test_private_name_has_expected_signature(module: str, name: str, parameters: list[str] | None) -> None:
    value = resolve(module, name)
    if parameters is not None:
        current = list(inspect.signature(value).parameters)
        assert current == parameters, f"Ray {ray.__version__}: the signature of {module}.{name} is now {current}"


@pytest.mark.parametrize(("module", "name"), READ_AT_RUN_TIME)
def test_assigned_constant_is_read_at_run_time(module: str, name: str) -> None:
    source = inspect.getsource(importlib.import_module(module))
    assert f"ray_constants.{name}" in source, f"Ray {ray.__version__}: {module} no longer reads ray_constants.{name}"


def test_node_sets_the_attributes_that_are_read() -> None:
    """They are set in the constructor, so the class does not show them."""
    source = inspect.getsource(resolve("ray._private.node", "Node"))
    for attribute in ("self.all_processes", "self.ray_init_cluster"):
        assert f"{attribute} = " in source or f"{attribute}: " in source, f"Node no longer sets {attribute}"


@pytest.mark.parametrize("name", [ray_private._AUTH_SETUP_LOGGER, *ray_private._UPLOAD_LOGGERS])
def test_hidden_notices_come_from_the_expected_loggers(name: str) -> None:
    module = importlib.import_module(name)
    loggers = [value.name for value in vars(module).values() if isinstance(value, logging.Logger)]
    assert name in loggers, f"Ray {ray.__version__}: {name} no longer logs under its name"


def test_actor_class_shows_its_options_and_plain_class() -> None:
    """`workers/host.py` reads these; it runs in the worker's venv and cannot import `ray_private`."""

    class Plain:
        pass

    decorated: Any = ray.remote(num_cpus=0)(Plain)
    assert decorated.__ray_metadata__.modified_class.__ray_actor_class__ is Plain
    assert dict(decorated._default_options)["num_cpus"] == 0


def test_no_other_module_uses_private_ray() -> None:
    broken = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path == Path(ray_private.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            if any(name == private or name.startswith(f"{private}.") for name in names for private in PRIVATE_MODULES):
                broken.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert broken == []


def test_slow_node_gets_more_time_than_ray_gives(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registered_at = time.monotonic() + 0.5

    def slow(gcs_address: str, node_id: str) -> dict[str, str]:
        if time.monotonic() < registered_at:
            raise RuntimeError("not registered")
        return {"node": node_id}

    monkeypatch.setattr(ray_private.services, "get_node", slow)
    monkeypatch.setattr(ray_private, "RAY_START_LIMIT_S", 0.1)
    with ray_private.patient_start(60.0):
        assert ray_private.services.get_node("address", "a") == {"node": "a"}
    assert "load average" in caplog.text
    assert ray_private.services.get_node is slow
    registered_at = time.monotonic() + 60.0
    with ray_private.patient_start(0.2), pytest.raises(RuntimeError, match="not registered"):
        ray_private.services.get_node("address", "a")


def test_start_fails_as_soon_as_the_raylet_has_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def never(gcs_address: str, node_id: str) -> None:
        raise RuntimeError("not registered")

    monkeypatch.setattr(ray_private.services, "get_node", never)
    raylet = tmp_path / "raylet"
    raylet.symlink_to("/bin/true")
    with subprocess.Popen([raylet]), ray_private.patient_start(600.0), pytest.raises(ClusterError, match="has ended"):
        ray_private.services.get_node("address", "a")


# As on a machine that is so busy that Ray's agents take 25 s to import their packages.
_SLOW_AGENTS = """
import sys, time
if any(word.endswith(("dashboard/agent.py", "runtime_env/agent/main.py")) for word in sys.orig_argv):
    time.sleep(25)
"""


@pytest.mark.slow  # waits for the agents
def test_agents_that_start_slowly_do_not_end_the_raylet(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_SLOW_AGENTS)
    script = (
        "import ray\n"
        "from nemo_rl.distributed.cluster.session import start_local_ray\n"
        "start_local_ray(num_cpus=1, num_gpus=0)\n"
        "print(ray.get(ray.remote(lambda: 'computed').remote()))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert process.stdout.splitlines()[-1:] == ["computed"], process.stderr[-3000:]
