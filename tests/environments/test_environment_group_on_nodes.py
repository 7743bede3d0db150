"""A group of environment workers on two simulated nodes, one of which is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from episode_replies import next_replies
from ray.cluster_utils import Cluster
from simulated_nodes import simulated_nodes

from nemo_rl.environments.environment_group import EnvironmentGroup
from nemo_rl.environments.episode_calls import Reply, Request


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """Start a head node, on which the driver runs, and a second node."""
    with simulated_nodes({"num_cpus": 2}, {"num_cpus": 2}) as cluster:
        _, cluster.second = cluster.list_all_nodes()
        yield cluster


def by_episode(replies: list[Reply]) -> dict[int, Reply]:
    found = {reply.episode: reply for reply in replies}
    assert len(found) == len(replies)
    return found


@pytest.mark.slow  # starts a cluster
@pytest.mark.parametrize("own_process", [False, True])
def test_episodes_of_a_lost_node_are_repeated_on_the_other(nodes: Cluster, tmp_path: Path, own_process: bool) -> None:
    group = EnvironmentGroup(
        "game",
        "sample_environments.Commands",
        {"directory": str(tmp_path)},
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
        own_process=own_process,
        num_replicas=2,
        max_restarts=0,  # the loss of a node does not count
    )
    try:
        node_of = {(r["child"] if own_process else r)["pid"]: r["node_id"] for r in group.attestation()}
        assert len({*node_of.values()}) == 2

        def places(episodes: set[int]) -> dict[int, str]:
            """Reset episodes, and return the node of each."""
            group.submit([Request(episode, "reset", {}) for episode in episodes])
            replies = by_episode(next_replies(group, len(episodes)))
            pids = {k: int(r.value["messages"][0]["content"].removeprefix("process ")) for k, r in replies.items()}
            return {episode: node_of[pid] for episode, pid in pids.items()}

        before = places({*range(8)})
        lost = {episode for episode, node in before.items() if node == nodes.second.node_id}
        assert len(lost) == 4
        group.submit([Request(episode, "step", f"wait_for step{episode}") for episode in before])
        while not all((tmp_path / f"step{episode}.started").exists() for episode in before):
            time.sleep(0.02)
        nodes.remove_node(nodes.second, allow_graceful=False)

        failures = by_episode(next_replies(group, 4))
        assert failures.keys() == lost
        assert all(
            "the worker of sample_environments.Commands.step has ended" in str(r.failure) for r in failures.values()
        )
        assert {*places(lost).values()} == {before[min({*before} - lost)]}
        group.submit([Request(episode, "step", f"wait_for step{episode}") for episode in lost])
        for episode in before:
            (tmp_path / f"step{episode}").touch()
        finished = by_episode(next_replies(group, 8))
        assert {episode: reply.value["reward"] for episode, reply in finished.items() if reply.value} == dict.fromkeys(
            range(8), 1.0
        )
        while len(records := group.attestation()) < 2:  # the lost worker has been replaced
            assert group.collect(timeout_s=0.1) == []
        assert len({record["node_id"] for record in records}) == 1
    finally:
        group.shutdown()
