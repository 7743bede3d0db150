"""A Megatron policy with Ray workers in the MCORE venv."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from tiny_policy import EPS, assert_equal, make_batch, make_model, make_worker
from transformers import AutoModelForCausalLM

from nemo_rl.algorithms.config import LossConfig
from nemo_rl.algorithms.loss_functions import ClippedPGLoss
from nemo_rl.distributed.cluster.session import start_local_ray
from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES
from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.errors import NonFiniteError
from nemo_rl.models.backends import policy_backend
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.policy import Policy
from nemo_rl.models.weights.receiver import receive
from nemo_rl.venvs import create_local_venv

pytestmark = pytest.mark.slow  # starts two engines in the MCORE venv

# The workers' venv contains this project, not this directory, so they cannot unpickle a loss of a test.
LOSS = ClippedPGLoss(LossConfig(importance_correction="none"))
CONFIG: dict[str, Any] = {
    "num_threads": 1,
    "max_sequence_length": 64,
    "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "eps": EPS},
    "scheduler": {"kind": "cosine", "warmup_steps": 2},
    "max_grad_norm": 0.5,
    "train_global_batch_size": 4,
    "train_micro_batch_size": 3,
    "logprob_batch_size": 3,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.fixture(scope="module")
def policy(model: Path) -> Iterator[Policy]:
    assert not ray.is_initialized(), "another test left Ray running"
    start_local_ray(num_cpus=2, num_gpus=0)
    config = PolicyConfig(backend="megatron", options={"pipeline_parallel_size": 2}, **CONFIG)
    with RayVirtualCluster([2], use_gpus=False) as cluster:
        policy = Policy(cluster, config, str(model), total_steps=20, seed=3)
        yield policy
        policy.shutdown()
    ray.shutdown()


def test_megatron_policy_matches_one_torch_worker(policy: Policy, model: Path, tmp_path: Path) -> None:
    batch, alone = make_batch(), make_worker(model)
    start = alone.get_logprobs(batch)
    torch.testing.assert_close(policy.get_logprobs(batch), start, rtol=0, atol=1e-4)
    for _ in range(2):
        result = policy.train(batch, LOSS)
        expected = alone.train(batch, LOSS, local_batch_size=4)
        assert result.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-6)
        assert (result.num_optimizer_steps, result.num_tokens) == (2, expected.num_tokens)
    torch.testing.assert_close(policy.get_reference_policy_logprobs(batch), start, rtol=0, atol=1e-4)
    policy.save_checkpoint(tmp_path / "c")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "c" / "model")
    published = dict(receive(policy.publish_weights(5, "float32")))
    assert_equal(published, {name: parameter.detach() for name, parameter in saved.named_parameters()})


def test_worker_error_keeps_its_type_on_the_driver(policy: Policy) -> None:
    batch = make_batch()
    before = policy.get_logprobs(batch)
    batch["advantages"] = torch.full_like(batch["advantages"], torch.nan)
    with pytest.raises(NonFiniteError, match="loss nan"):
        policy.train(batch, LOSS)
    assert torch.equal(policy.get_logprobs(batch), before)


def test_attestation_has_venv_and_pipeline_stage(policy: Policy) -> None:
    records = policy.attestation()
    assert [record["pipeline_stage"] for record in records] == [0, 1]
    python = Path(create_local_venv(PY_EXECUTABLES.MCORE, policy_backend("megatron").fqn))
    assert {Path(record["prefix"]).resolve() for record in records} == {python.parents[1].resolve()}
