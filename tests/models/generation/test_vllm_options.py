"""Tests the driver's part of the vLLM backend, which does not need vLLM."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES
from nemo_rl.errors import ConfigError
from nemo_rl.jobs.roles import job_roles
from nemo_rl.models.generation.vllm.config import VllmOptions
from nemo_rl.utils.config import load_config
from nemo_rl.venvs import parse_py_executable


def test_options_are_validated() -> None:
    overrides = ["policy.generation.backend=vllm", "policy.generation.options.tensor_parallel_size=2"]
    options = load_config(MasterConfig, None, overrides).policy.generation.options
    assert isinstance(options, VllmOptions)
    assert options.workers_per_replica == 2
    assert options.max_concurrent_calls == 1  # the ranks of a tied group must take the same steps
    assert VllmOptions().max_concurrent_calls > 1
    with pytest.raises(ConfigError, match="did you mean tensor_parallel_size"):
        load_config(
            MasterConfig, None, ["policy.generation.backend=vllm", "policy.generation.options.tensor_paralel=2"]
        )
    with pytest.raises(ConfigError, match="unknown key tensor_parallel_size"):
        load_config(MasterConfig, None, ["policy.generation.options.tensor_parallel_size=2"])
    with pytest.raises(ConfigError, match="http_port needs tensor_parallel_size=1"):
        load_config(MasterConfig, None, [*overrides, "policy.generation.options.http_port=8000"])


@pytest.mark.parametrize(("gpus", "expected"), [(0, PY_EXECUTABLES.VLLM_CPU), (2, PY_EXECUTABLES.VLLM)])
def test_nodes_without_gpus_use_the_cpu_build(monkeypatch, gpus: int, expected: str) -> None:
    monkeypatch.delenv("NEMO_RL_PY_EXECUTABLES_SYSTEM", raising=False)
    config = load_config(MasterConfig, None, ["policy.generation.backend=vllm", f"cluster.gpus_per_node={gpus}"])
    [generation] = [role for role in job_roles(config) if role.name == "generation"]
    assert generation.spec == parse_py_executable(expected)


def test_worker_module_does_not_import_vllm() -> None:
    code = "import sys, nemo_rl.models.generation.vllm.vllm_worker; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=400)
    assert done.stdout.strip() == "False"
