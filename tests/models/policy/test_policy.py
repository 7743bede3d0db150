"""A policy with Ray workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from tiny_policy import advantage_loss, assert_equal, make_batch, make_worker, nan_loss, weights
from transformers import AutoModelForCausalLM

from nemo_rl.distributed.cluster.session import start_local_ray
from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.errors import ConfigError, ModelError, NonFiniteError, WorkerStartError
from nemo_rl.models.backends import POLICY_BACKENDS, Backend, policy_backend
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.policy import Policy
from nemo_rl.models.weights.receiver import receive

WORKERS = 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayVirtualCluster]:
    patch = pytest.MonkeyPatch()
    patch.setenv("NEMO_RL_PY_EXECUTABLES_SYSTEM", "1")
    # The loss is pickled by name, so the workers must be able to import its module.
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))
    assert not ray.is_initialized(), "another test left Ray running"
    start_local_ray(num_cpus=4, num_gpus=1)  # a logical GPU that no worker uses
    with RayVirtualCluster([WORKERS], use_gpus=False, max_colocated_worker_groups=3) as cluster:
        yield cluster
    ray.shutdown()
    patch.undo()


def make_policy(cluster: RayVirtualCluster, model: Path, **config: Any) -> Policy:
    defaults: dict[str, Any] = {
        "num_threads": 1,
        "max_sequence_length": 64,
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4},
        "scheduler": {"kind": "cosine", "warmup_steps": 2},
        "max_grad_norm": 0.5,
    }
    return Policy(cluster, PolicyConfig(**(defaults | config)), str(model), total_steps=20, seed=3)


@pytest.fixture(scope="module")
def policies(cluster: RayVirtualCluster, llama: Path) -> Iterator[dict[str, Policy]]:
    """Policies with different batching modes and shardings, started together."""
    configs: dict[str, dict[str, Any]] = {
        "ddp": {"train_global_batch_size": 4, "logprob_batch_size": 3},
        "fsdp": {
            "sharding": "fsdp",
            "train_global_batch_size": 4,
            "batching": {"mode": "packed", "max_tokens": 30},
        },
    }
    started = {name: make_policy(cluster, llama, **config) for name, config in configs.items()}
    for policy in started.values():
        policy.wait_ready()
    yield started
    for policy in started.values():
        policy.shutdown()


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_policy_matches_one_worker(policies: dict[str, Policy], llama: Path, tmp_path: Path, name: str) -> None:
    policy, batch = policies[name], make_batch()
    alone = make_worker(llama)
    start = alone.get_logprobs(batch)
    torch.testing.assert_close(policy.get_logprobs(batch), start, rtol=1e-4, atol=1e-5)
    for _ in range(2):
        result = policy.train(batch, advantage_loss)
        expected = alone.train(batch, advantage_loss, local_batch_size=4)
        assert result.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-6)
        assert result.num_optimizer_steps == 2
        assert result.num_tokens == expected.num_tokens
    torch.testing.assert_close(policy.get_logprobs(batch), alone.get_logprobs(batch), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy.get_reference_policy_logprobs(batch), start, rtol=1e-4, atol=1e-5)
    policy.save_checkpoint(tmp_path / "c")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "c" / "model").state_dict()
    trained = {name: tensor for name, tensor in weights(alone).items() if "/" not in name}
    torch.testing.assert_close(saved, trained, rtol=1e-4, atol=1e-4)


def test_published_weights_equal_the_checkpoint(policies: dict[str, Policy], tmp_path: Path) -> None:
    policy = policies["ddp"]
    policy.save_checkpoint(tmp_path / "c")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "c" / "model")
    update = policy.publish_weights(5, "float32")
    assert update.version == 5
    assert_equal(dict(receive(update)), dict(saved.named_parameters()))


def test_loading_a_checkpoint_undoes_training(policies: dict[str, Policy], tmp_path: Path) -> None:
    policy, batch = policies["fsdp"], make_batch()
    before = policy.get_logprobs(batch)
    policy.save_checkpoint(tmp_path / "c")
    first = policy.train(batch, advantage_loss)
    assert not torch.equal(policy.get_logprobs(batch), before)
    policy.load_checkpoint(tmp_path / "c")
    assert torch.equal(policy.get_logprobs(batch), before)
    assert policy.train(batch, advantage_loss) == first


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_offload_changes_neither_logprobs_nor_weights(policies: dict[str, Policy], name: str) -> None:
    policy, batch = policies[name], make_batch()
    expected = policy.get_logprobs(batch)
    digest = policy.publish_weights(1, "bfloat16").digest
    policy.offload(keep_weights=True)
    assert policy.publish_weights(2, "bfloat16").digest == digest
    policy.offload()
    assert policy.publish_weights(3, "bfloat16").digest == digest
    assert torch.equal(policy.get_logprobs(batch), expected)
    policy.offload()
    assert policy.train(batch, advantage_loss).metrics["grad_norm"] > 0


def test_worker_error_keeps_its_type_on_the_driver(policies: dict[str, Policy]) -> None:
    policy, batch = policies["ddp"], make_batch()
    before = policy.get_logprobs(batch)
    with pytest.raises(NonFiniteError, match="loss nan"):
        policy.train(batch, nan_loss)
    assert torch.equal(policy.get_logprobs(batch), before)


def test_attestation_of_every_worker(policies: dict[str, Policy]) -> None:
    records = policies["fsdp"].attestation()
    assert [record["rank"] for record in records] == list(range(WORKERS))
    assert len({record["pid"] for record in records}) == WORKERS
    assert all(record["torch"] == torch.__version__ and record["num_threads"] == 1 for record in records)


def test_missing_model_fails_the_start(cluster: RayVirtualCluster, tmp_path: Path) -> None:
    policy = make_policy(cluster, tmp_path / "nowhere")
    with pytest.raises(WorkerStartError, match=r"no model directory '.*nowhere'"):
        policy.wait_ready()
    policy.shutdown()


def test_unresolved_embedded_model_is_refused(cluster: RayVirtualCluster) -> None:
    with pytest.raises(ModelError, match="ensure_embedded_model"):
        Policy(cluster, PolicyConfig(), total_steps=1, seed=0)


def test_unknown_backend_suggests_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'torsh' is unknown\. Did you mean 'torch'\?"):
        policy_backend("torsh")


@pytest.mark.slow  # starts two policy groups
def test_gpu_env_vars_are_set_before_imports(
    cluster: RayVirtualCluster, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fqn = "variables_worker.VariablesWorker"
    expected = policy_backend("megatron").gpu_env_vars
    assert expected == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    monkeypatch.setitem(POLICY_BACKENDS, "variables", Backend(fqn, gpu_env_vars=expected))
    monkeypatch.setitem(ACTOR_ENVIRONMENT_REGISTRY, fqn, "unused")

    def variables(place: RayVirtualCluster) -> dict[str, str]:
        policy = make_policy(place, llama, backend="variables")
        reported = policy.attestation()[0]["variables"]
        policy.shutdown()
        return reported

    with RayVirtualCluster([1], use_gpus=True) as on_gpu:
        reported = variables(on_gpu)
    assert expected.items() <= reported.items()
    assert reported["CUDA_VISIBLE_DEVICES"].isdigit()  # only the GPU of this worker
    with RayVirtualCluster([1], use_gpus=False) as on_cpu:
        assert variables(on_cpu)["CUDA_VISIBLE_DEVICES"] == ""
