"""The example plugin, installed as users install one and used by a process that knows only its names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PLUGIN = REPOSITORY / "examples" / "plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for sys.path with the plugin as a wheel installs it: metadata and all."""
    from nemo_rl.venvs.installer import find_uv

    folder = tmp_path_factory.mktemp("site")
    command = [find_uv(), "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(PLUGIN)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    subprocess.run([*command, "--python", sys.executable], check=True, env=env)
    return folder


def run(site: Path, program: str, **env: str) -> str:
    path = os.pathsep.join((str(site), str(REPOSITORY)))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_environment_is_known_by_name_and_judges(site: Path) -> None:
    program = """
import importlib, sys
from nemo_rl.distributed.ray_actor_environment_registry import get_actor_python_env
from nemo_rl.environments.registry import environment_fqn
fqn = environment_fqn("reverse")
assert "nemo_rl_plugin.reverse_environment" not in sys.modules, "the driver imports no environment"
assert get_actor_python_env(fqn) == sys.executable
module, _, name = fqn.rpartition(".")
environment = getattr(importlib.import_module(module), name)()
result, metrics = environment.global_post_process_and_metrics(
    environment.step(["cba", "abc", " "], [{"word": "abc"}] * 3))
print(result.rewards.tolist(), result.status, round(metrics["accuracy"], 2))
"""
    assert run(site, program) == "[1.0, 0.0, 0.0] ['ok', 'ok', 'unparseable'] 0.33\n"


def test_the_stage_runs_in_a_pipeline_step(site: Path) -> None:
    program = """
import pandas
from nemo_rl.pipelines import DocumentBatch
from nemo_rl_plugin.shorten_stage import Shorten
task = DocumentBatch("b", "d", pandas.DataFrame({"text": ["abcdef", "x"]}))
print(list(Shorten(3).process(task).to_pandas()["text"]))
"""
    assert run(site, program) == "['abc', 'x']\n"


@pytest.mark.slow
def test_the_worker_runs_on_ray_in_a_venv_that_has_its_package(site: Path, tmp_path: Path) -> None:
    program = """
import ray
from nemo_rl.distributed.ray_session import start_local_ray
from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.distributed.worker_groups import RayWorkerBuilder, RayWorkerGroup
start_local_ray(num_cpus=1, num_gpus=0)
cluster = RayVirtualCluster([1], use_gpus=False)
group = RayWorkerGroup(cluster, RayWorkerBuilder("nemo_rl_plugin.distance_worker.DistanceWorker"))
print(ray.get(group.run_all_workers_single_data("distance", left="kitten", right="sitting")))
group.shutdown(); cluster.shutdown(); ray.shutdown()
"""
    assert run(site, program, NEMO_RL_VENV_DIR=str(tmp_path)).endswith("[3]\n")


def test_without_the_plugin_its_names_are_unknown() -> None:
    program = """
from nemo_rl.environments.registry import environment_fqn
from nemo_rl.errors import ConfigError
try: environment_fqn("reverse")
except ConfigError as error: print(error)
"""
    assert "'nemo_rl.environments'" in run(REPOSITORY, program)
