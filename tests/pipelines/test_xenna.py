"""The Xenna executor, in an additive venv with cosmos-xenna over the tests' venv."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import packaging
import psutil
import pytest
import ray

from nemo_rl.errors import PipelineDefinitionError
from nemo_rl.pipelines import XennaExecutor
from nemo_rl.pipelines.executors.xenna import _actors_killed_at_exit

SCRIPT = Path(__file__).with_name("xenna_script.py")


@pytest.mark.skipif(importlib.util.find_spec("cosmos_xenna") is not None, reason="cosmos-xenna is installed here")
def test_missing_extra_names_the_command() -> None:
    with pytest.raises(PipelineDefinitionError, match="uv sync --extra xenna"):
        XennaExecutor()


# Another job on the same cluster, with an actor of the same class name. The actor must survive.
OTHER_JOB = """
import logging, sys, ray
ray.init(address=sys.argv[1], logging_level=logging.ERROR, log_to_driver=False)
class StageWorker:
    def ping(self):
        return "pong"
worker = ray.remote(StageWorker).options(num_cpus=0, max_restarts=0).remote()
print(ray.get(worker.ping.remote()), flush=True)
sys.stdin.readline()
print(ray.get(worker.ping.remote()), flush=True)
"""


@pytest.mark.slow
def test_only_actors_of_this_job_are_killed(ray_local: str) -> None:
    class StageWorker:  # the name of Xenna's actors; a local class is pickled by value
        def process(self) -> int:
            return os.getpid()

    command = [sys.executable, "-c", OTHER_JOB, ray_local]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        with _actors_killed_at_exit():
            assert other.stdout.readline() == "pong\n"
            worker = ray.remote(StageWorker).options(num_cpus=0).remote()
            process = psutil.Process(ray.get(worker.process.remote()))
        process.wait(timeout=400)
        output, _ = other.communicate("\n", timeout=400)
    assert output == "pong\n"


@pytest.mark.slow
def test_xenna_pipelines(tmp_path: Path, xenna_python: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    command = [xenna_python, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    assert result["numbers"] == list(range(12))
    assert result["versions"] == [[packaging.__version__, "23.2", "24.0"]]
    assert result["remaining"] == [1, 2, 7, 8]  # 2 and 3 are in the batch that failed
    assert [error.partition(":")[0] for error in result["failed"]] == ["ValueError"]
    assert result["survived"] == list(range(2, 34))
    assert (result["deaths"], result["attempts"]) == (1, 2)
    assert "stage 'Failing' failed on task 'b3': ValueError: cannot take 7" in result["message"]
