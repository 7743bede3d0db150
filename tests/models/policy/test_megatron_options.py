"""The Megatron backend on the driver: options, layout, memory estimate."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.errors import ConfigError
from nemo_rl.models.policy.megatron.config import MegatronOptions
from nemo_rl.utils.config import iter_keys, load_config


def test_layout_order_of_parallel_axes() -> None:
    options = MegatronOptions(tensor_parallel_size=2, context_parallel_size=2, pipeline_parallel_size=2)
    layout = options.layout(16)
    assert layout.shape == {"pipeline_parallel": 2, "data_parallel": 2, "context_parallel": 2, "tensor_parallel": 2}
    assert layout.get_worker_coords(1)["tensor_parallel"] == 1
    assert layout.get_worker_coords(2)["context_parallel"] == 1
    assert layout.get_worker_coords(4)["data_parallel"] == 1
    assert layout.get_worker_coords(8)["pipeline_parallel"] == 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["policy.options.tensor_parallel_size=3", "cluster.cpu_workers_per_node=4"], "4 workers cannot be divided"),
        (["policy.options.tensor_parallel_size=2"], "1 workers cannot be divided into groups of 2"),
        (["policy.options.sequence_parallel=true"], "sequence_parallel needs tensor_parallel_size of at least 2"),
        (["policy.options.tensor_paralel_size=2"], "did you mean tensor_parallel_size"),
        (["policy.sharding=fsdp"], "policy.sharding=fsdp is for the torch backend"),
        (
            [
                "policy.options.context_parallel_size=2",
                "cluster.cpu_workers_per_node=2",
                "policy.batching={mode: packed, max_tokens: 128}",
            ],
            "policy.batching.mode=packed does not support policy.options.context_parallel_size",
        ),
    ],
)
def test_invalid_options_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(MasterConfig, None, ["policy.backend=megatron", *overrides])


def test_tensor_parallel_workers_need_no_extra_samples() -> None:
    overrides = ["policy.backend=megatron", "policy.options.tensor_parallel_size=2", "cluster.cpu_workers_per_node=2"]
    load_config(MasterConfig, None, [*overrides, "grpo.num_prompts_per_step=1", "policy.train_global_batch_size=1"])


def test_training_bytes_divide_by_parallel_sizes() -> None:
    def estimate(options: dict, workers: int, **policy: object) -> int:
        overrides = [f"policy.options.{key}={value}" for key, value in options.items()]
        overrides += [f"policy.{key}={value}" for key, value in policy.items()]
        overrides += [f"cluster.cpu_workers_per_node={workers}", f"grpo.num_prompts_per_step={workers}"]
        section = load_config(MasterConfig, None, ["policy.backend=megatron", *overrides]).policy
        return section.options.training_bytes(section, 1_000_000, workers)

    assert estimate({}, 1) == 16_000_000
    assert estimate({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, 4) == 4_000_000
    assert estimate({}, 4) == 8_000_000 + 2_000_000
    assert estimate({"distributed_optimizer": "false"}, 4) == 16_000_000
    assert estimate({}, 1, precision="bfloat16") == 18_000_000


def test_help_lists_every_megatron_option() -> None:
    keys = {key.name: key.help for key in iter_keys(MasterConfig)}
    for name in MegatronOptions.model_fields:
        assert "Only with policy.backend=megatron" in keys[f"policy.options.{name}"]


def test_options_import_neither_torch_nor_megatron() -> None:
    code = "import nemo_rl.models.policy.megatron.config, sys; print('torch' in sys.modules, 'megatron' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
