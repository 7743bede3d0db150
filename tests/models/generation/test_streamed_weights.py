"""Tests weight streams and adapters from policy to generation, on real Ray workers, some of which are killed."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from tiny_generation import TinyModel, assert_same

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.distributed.cluster.session import start_local_ray
from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.errors import WeightSyncError, WorkerError
from nemo_rl.models.generation.config import GenerationConfig
from nemo_rl.models.generation.generation import Generation
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.policy import Policy
from nemo_rl.models.policy.weight_offer import PolicyWeights
from nemo_rl.models.weights.interfaces import WeightOffer, WeightUpdate
from nemo_rl.models.weights.routes import Route

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets and memfd need Linux")

PROMPTS = BatchedDataDict(input_ids=torch.arange(3, 33).reshape(6, 5), input_lengths=torch.full((6,), 5))


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayVirtualCluster]:
    patch = pytest.MonkeyPatch()
    patch.setenv("NEMO_RL_PY_EXECUTABLES_SYSTEM", "1")
    start_local_ray(num_cpus=4, num_gpus=0)
    with RayVirtualCluster([2], use_gpus=False, max_colocated_worker_groups=6) as cluster:
        yield cluster
    ray.shutdown()
    patch.undo()


@pytest.fixture(scope="module")
def model(tiny: Any) -> Path:
    qwen: TinyModel = tiny("qwen3")
    qwen.model.save_pretrained(qwen.directory)
    return qwen.directory


BY_MEMORY = Route("shared_memory", "shared_memory", spans_nodes=False)
BY_PAIRS = Route("ray", "gloo", spans_nodes=True)  # every rank of the policy sends


def make_policy(cluster: RayVirtualCluster, model: Path, route: Route = BY_MEMORY, **policy: Any) -> Policy:
    return Policy(cluster, make_config(**policy), str(model), total_steps=20, seed=3, route=route)


def make_config(**policy: Any) -> PolicyConfig:
    generation = GenerationConfig(max_new_tokens=8, num_threads=1, max_restarts=2)
    return PolicyConfig(num_threads=1, max_sequence_length=64, generation=generation, **policy)


def policy_and_generation(
    cluster: RayVirtualCluster, model: Path, route: Route = BY_MEMORY, **policy: Any
) -> tuple[Policy, Generation]:
    return make_policy(cluster, model, route, **policy), Generation(cluster, make_config(**policy), str(model))


@pytest.fixture(scope="module")
def generation(cluster: RayVirtualCluster, model: Path) -> Iterator[Generation]:
    """The workers that receive from every policy in turn; a policy's settings do not concern them."""
    generation = Generation(cluster, make_config(), str(model))
    yield generation
    generation.shutdown()


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) for name in ("replicated", "fsdp", "fsdp, pairs")],
)
def both(
    request: pytest.FixtureRequest, cluster: RayVirtualCluster, model: Path, generation: Generation
) -> Iterator[tuple[Policy, Generation]]:
    sharding = {"sharding": "fsdp"} if request.param.startswith("fsdp") else {}
    route = BY_PAIRS if request.param.endswith("pairs") else BY_MEMORY
    policy = make_policy(cluster, model, route, **sharding)
    yield policy, generation
    policy.shutdown()


def offer(policy: Policy, version: int) -> WeightOffer:
    offered = policy.offer_weights(version, "float32")
    assert isinstance(offered, PolicyWeights)
    return offered


def test_streamed_weights_match_published_ones(both: tuple[Policy, Generation]) -> None:
    policy, generation = both
    for version in (1, 2):
        published = policy.publish_weights(version, "float32")
        offered = offer(policy, version)
        assert generation.update_weights(offered) == published.digest == offered.digest
        assert {record["weights_version"] for record in generation.attestation()} == {version}


def test_offer_expires_when_the_policy_changes(both: tuple[Policy, Generation], tmp_path: Path) -> None:
    policy, generation = both
    policy.save_checkpoint(tmp_path / "c")
    old = offer(policy, 3)
    policy.load_checkpoint(tmp_path / "c")
    with pytest.raises(WeightSyncError, match="no longer has the weights of version 3"):
        generation.update_weights(old)
    with pytest.raises(WeightSyncError, match="version 3 have not been sent yet"):
        _ = old.digest


@pytest.mark.slow  # starts a policy group
def test_policy_without_a_route_publishes(cluster: RayVirtualCluster, model: Path) -> None:
    config = PolicyConfig(num_threads=1, max_sequence_length=64)
    policy = Policy(cluster, config, str(model), total_steps=20, seed=3)
    assert isinstance(policy.offer_weights(1, "float32"), WeightUpdate)
    policy.shutdown()


@pytest.mark.slow  # starts the workers of five groups
@pytest.mark.parametrize("route", [BY_MEMORY, BY_PAIRS], ids=["memory", "pairs"])
def test_restarted_workers_get_a_new_stream(cluster: RayVirtualCluster, model: Path, route: Route) -> None:
    policy, generation = policy_and_generation(cluster, model, route)
    try:
        generation.update_weights(offer(policy, 1))
        undisturbed = generation.generate(PROMPTS, seed=3)
        survivor, victim = [record["pid"] for record in generation.attestation()]
        os.kill(victim, signal.SIGKILL)  # detected by a call for completions
        assert_same(generation.generate(PROMPTS, seed=3), undisturbed)
        kept, new = [record["pid"] for record in generation.attestation()]
        assert (kept == survivor, new == victim) == (True, False)
        os.kill(new, signal.SIGKILL)  # detected while weights are sent
        last = offer(policy, 2)
        generation.update_weights(last)
        assert [record["weights_version"] for record in generation.attestation()] == [2, 2]
        redone = generation.generate(PROMPTS, seed=3)
        assert torch.equal(redone.output_ids, undisturbed.output_ids)
    finally:
        policy.shutdown()
        generation.shutdown()


@pytest.mark.slow  # starts a policy group
def test_restarted_worker_gets_base_and_adapters(
    cluster: RayVirtualCluster, model: Path, generation: Generation
) -> None:
    """A policy with LoRA publishes adapters where it would stream weights."""
    policy = make_policy(cluster, model, sharding="fsdp", lora={"rank": 4}, optimizer={"lr": 0.01})
    batch = BatchedDataDict(**PROMPTS, token_mask=torch.ones(6, 5), sample_mask=torch.ones(6))
    train = functools.partial(policy.train, batch, lambda logprobs, *_: (logprobs.sum() / 100, {}))
    try:
        train()
        first = policy.offer_weights(1, "float32")
        assert isinstance(first, WeightUpdate)
        assert first.base is not None
        assert generation.update_weights(first) == first.digest
        undisturbed = generation.generate(PROMPTS, seed=3)
        pids = [record["pid"] for record in generation.attestation()]
        os.kill(pids[1], signal.SIGKILL)
        train()  # the restarted worker gets the weights from before this step
        assert_same(generation.generate(PROMPTS, seed=3), undisturbed)
        assert [record["pid"] == pid for record, pid in zip(generation.attestation(), pids)] == [True, False]
        second = policy.offer_weights(2, "float32", lasting=True)
        assert generation.update_weights(second, in_flight=True) == second.digest != first.digest
        by_adapters = generation.generate(PROMPTS, seed=4)
        merged = policy.publish_weights(3, "float32")
        assert generation.update_weights(merged) == merged.digest
        by_weights = generation.generate(PROMPTS, seed=4)
        assert torch.equal(by_adapters.output_ids, by_weights.output_ids)
        assert torch.equal(by_adapters.logprobs, by_weights.logprobs)
    finally:
        policy.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "route"), [(0, BY_MEMORY), (1, BY_MEMORY), (1, BY_PAIRS)])
def test_dead_policy_worker_fails_the_update(cluster: RayVirtualCluster, model: Path, rank: int, route: Route) -> None:
    policy, generation = policy_and_generation(cluster, model, route, sharding="fsdp")
    try:
        generation.update_weights(offer(policy, 1))
        os.kill(policy.attestation()[rank]["pid"], signal.SIGKILL)
        with pytest.raises(WorkerError, match=f"worker rank {rank} .* died during a call"):
            generation.update_weights(offer(policy, 2))
        with pytest.raises(WeightSyncError, match="has no weights"):
            generation.generate(PROMPTS, seed=3)
    finally:
        policy.shutdown()
        generation.shutdown()
