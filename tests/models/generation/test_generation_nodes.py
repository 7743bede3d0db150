"""Tests generation over two simulated nodes, one of which is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster
from simulated_nodes import simulated_nodes
from tiny_generation import TinyModel, assert_same

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.errors import WorkerError
from nemo_rl.models.generation.config import GenerationConfig
from nemo_rl.models.generation.generation import Generation
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.weights.sender import publish

TEXTS = [f"{first}+{second}=" for first in range(10, 20) for second in range(20, 30)]


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """Start a head node with one CPU, where the driver runs."""
    with simulated_nodes({"num_cpus": 1}) as cluster:
        yield cluster


@pytest.mark.slow
def test_other_replicas_take_the_work_of_a_lost_node(nodes: Cluster, tiny) -> None:
    second = nodes.add_node(num_cpus=2, include_dashboard=False)
    model: TinyModel = tiny("llama")
    # A lost node does not count as a restart, whatever its number of replicas.
    config = GenerationConfig(max_new_tokens=24, num_threads=1, max_batch_size=64, max_restarts=1)
    with RayVirtualCluster([1, 2], use_gpus=False, placement_group_strategy="STRICT_SPREAD") as bundles:
        generation = Generation(
            bundles, PolicyConfig(model_name=str(model.directory), generation=config, max_sequence_length=64)
        )
        try:
            ids, lengths = model.prompts(*TEXTS)
            prompts = BatchedDataDict(input_ids=ids, input_lengths=lengths)
            generation.update_weights(publish(model.model.named_parameters(), version=1, dtype="float32"))
            undisturbed = generation.generate(prompts, seed=3, num_generations=4)
            assert len({record["node_id"] for record in generation.attestation()}) == 2
            loss = threading.Timer(0.05, nodes.remove_node, (second,), {"allow_graceful": False})
            loss.start()
            assert_same(generation.generate(prompts, seed=3, num_generations=4), undisturbed)
            loss.join()
            assert_same(generation.generate(prompts, seed=3, num_generations=4), undisturbed)
            update = publish(model.model.named_parameters(), version=2, dtype="float32")
            assert generation.update_weights(update) == update.digest
            [record] = generation.attestation()
            assert (record["rank"], record["weights_version"]) == (0, 2)
        finally:
            generation.shutdown()


@pytest.mark.slow
def test_losing_every_replica_raises_worker_error(nodes: Cluster, tiny) -> None:
    second = nodes.add_node(num_cpus=2, include_dashboard=False)
    model: TinyModel = tiny("llama")
    config = GenerationConfig(max_new_tokens=9, num_threads=1)
    with RayVirtualCluster([2], use_gpus=False) as bundles:
        generation = Generation(
            bundles, PolicyConfig(model_name=str(model.directory), generation=config, max_sequence_length=64)
        )
        try:
            generation.update_weights(publish(model.model.named_parameters(), version=1, dtype="float32"))
            nodes.remove_node(second, allow_graceful=False)
            ids, lengths = model.prompts("1+1=", "2+2=")
            prompts = BatchedDataDict(input_ids=ids, input_lengths=lengths)

            def generate_until_it_fails() -> None:
                for _ in range(1000):  # a worker survives its node's raylet for a moment
                    generation.generate(prompts, seed=3)

            with pytest.raises(WorkerError, match="worker rank . .* died during a call"):
                generate_until_it_fails()
        finally:
            generation.shutdown()
