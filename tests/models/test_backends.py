"""Backends: options from the command line to the worker's section, and the workers' Python."""

from __future__ import annotations

import pytest
from pydantic import Field

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.distributed.named_sharding import NamedSharding
from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY, PY_EXECUTABLES
from nemo_rl.errors import ConfigError
from nemo_rl.models.backends import POLICY_BACKENDS, Backend
from nemo_rl.models.policy.config import DATA_PARALLEL, PolicyOptions
from nemo_rl.utils.config import dump_yaml, iter_keys, load_config

FQN = "somewhere.workers.PairPolicyWorker"


class PairOptions(PolicyOptions):
    tensor_parallel_size: int = Field(1, ge=1, description="Workers that share a layer.")

    def layout(self, num_workers: int) -> NamedSharding:
        if num_workers % self.tensor_parallel_size:
            raise ConfigError(f"policy.options.tensor_parallel_size does not divide {num_workers} workers")
        ranks = [
            [r + t for t in range(self.tensor_parallel_size)] for r in range(0, num_workers, self.tensor_parallel_size)
        ]
        return NamedSharding(ranks, [DATA_PARALLEL, "tensor_parallel"])


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setitem(POLICY_BACKENDS, "pair", Backend(FQN, PairOptions))


def test_options_use_the_section_of_the_backend(pair, tmp_path):
    overrides = ["policy.backend=pair", "policy.options.tensor_parallel_size=2", "cluster.cpu_workers_per_node=2"]
    config = load_config(MasterConfig, None, overrides)
    assert config.policy.options == PairOptions(tensor_parallel_size=2)
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_yaml(config))
    assert load_config(MasterConfig, saved) == config


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["policy.backend=pair", "policy.options.tensor_paralel_size=2"], "did you mean tensor_parallel_size"),
        (["policy.backend=pair", "policy.options.tensor_parallel_size=0"], "greater than or equal to 1"),
        (["policy.options.tensor_parallel_size=2"], "command line: policy.options: unknown key tensor_parallel_size"),
        (["policy.backend=pear"], "Did you mean 'pair'"),
        (
            ["policy.backend=pair", "policy.options.tensor_parallel_size=2", "cluster.cpu_workers_per_node=3"],
            "does not divide 3 workers",
        ),
    ],
)
def test_invalid_options_are_refused(pair, overrides, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(MasterConfig, None, overrides)


def test_batch_size_check_counts_data_parallel_ranks(pair):
    overrides = ["policy.backend=pair", "policy.options.tensor_parallel_size=2", "cluster.cpu_workers_per_node=6"]
    with pytest.raises(ConfigError, match="over 3 data-parallel"):
        load_config(MasterConfig, None, overrides)


def test_help_names_the_backend_of_each_option(pair):
    keys = {key.name: key for key in iter_keys(MasterConfig)}
    assert "Only with policy.backend=pair" in keys["policy.options.tensor_parallel_size"].help


def test_cpu_nodes_use_cpu_python_unless_configured(monkeypatch):
    backend = Backend(FQN, cpu_python="VLLM_CPU", gpu_python="VLLM")
    monkeypatch.setitem(ACTOR_ENVIRONMENT_REGISTRY, FQN, PY_EXECUTABLES.VLLM)
    assert backend.py_executable(None, use_gpus=True) == PY_EXECUTABLES.VLLM
    assert backend.py_executable(None, use_gpus=False) == PY_EXECUTABLES.VLLM_CPU
    assert backend.py_executable(PY_EXECUTABLES.BASE, use_gpus=False) == PY_EXECUTABLES.BASE
    monkeypatch.setitem(ACTOR_ENVIRONMENT_REGISTRY, FQN, PY_EXECUTABLES.MCORE)
    assert backend.py_executable(None, use_gpus=False) == PY_EXECUTABLES.MCORE
    monkeypatch.setenv("NEMO_RL_PY_EXECUTABLES_SYSTEM", "1")
    assert backend.py_executable(None, use_gpus=False) == PY_EXECUTABLES.SYSTEM
