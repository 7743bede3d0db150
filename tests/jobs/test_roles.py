"""Tests the checks of extras and of the weight transport before a job starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.errors import ConfigError, UnknownExtraError
from nemo_rl.jobs.roles import check_weight_route, job_roles
from nemo_rl.utils.config import load_config


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["policy.weight_transport=nccll"], "policy.weight_transport: unknown .* Did you mean 'nccl'"),
        (["policy.weight_transport=nccl"], "weight_transport=nccl is for workers on GPUs"),
        (
            ["policy.weight_transport=nccl", "cluster.gpus_per_node=2"],
            "for generation on separate GPUs, and here it shares the policy",
        ),
        (
            ["policy.weight_transport=cuda_ipc", "cluster={gpus_per_node: 1, generation: {gpus_per_node: 1}}"],
            "cuda_ipc is for generation on the policy's GPUs, and here it has separate GPUs",
        ),
        (["policy.weight_transport=shared_memory", "cluster.num_nodes=2"], "here they are on several"),
    ],
)
def test_unreachable_transport_is_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_weight_route(load_config(MasterConfig, None, overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["policy.weight_transport=ray", "cluster.num_nodes=2"],
        ["policy.weight_transport=gloo"],
        ["policy.weight_transport=cuda_ipc", "cluster.gpus_per_node=2"],
        ["policy.weight_transport=nccl", "cluster={gpus_per_node: 1, generation: {gpus_per_node: 1}}"],
    ],
)
def test_reachable_transport_is_accepted(overrides: list[str]) -> None:
    check_weight_route(load_config(MasterConfig, None, overrides))


def test_project_without_the_extra_of_a_role_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "mine"\nversion = "1"\n')
    monkeypatch.setenv("NEMO_RL_PROJECT_ROOT", str(tmp_path))
    assert len(job_roles(load_config(MasterConfig))) == 3
    with pytest.raises(UnknownExtraError, match=r"no extra 'mcore'\. Run `nemo-rl add mcore`"):
        job_roles(load_config(MasterConfig, None, ["policy.backend=megatron"]))
