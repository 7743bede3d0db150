"""Runs the default GRPO job on a cluster of two nodes and removes one during the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from simulated_nodes import simulated_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "grpo.num_prompts_per_step=4",
    "grpo.num_generations_per_prompt=4",
    "grpo.validation.period=2",
    "grpo.validation.max_num_problems=16",
    "grpo.max_num_steps=4",
    "checkpointing.save_period=1",
)


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """Start a head and a second node. The driver prefers the head. This process does not connect."""
    with simulated_nodes({"num_cpus": 2}, {"num_cpus": 2}, is_joined=False) as cluster:
        _, cluster.second = cluster.list_all_nodes()
        yield cluster


def start(directory: Path, nodes: Cluster, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples/run_grpo_math.py"), *SMALL, f"logger.log_dir={directory}", *arguments],
        env={**os.environ, "RAY_ADDRESS": nodes.address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoint(directory: Path, step: int, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not (directory / "checkpoints" / f"step_{step:06}").exists():
        assert job.poll() is None, f"the job ended early: {job.communicate()[1][-3000:]}"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, errors = job.communicate(timeout=800)
    finally:
        job.kill()  # no effect on a job that has ended
    return job.returncode, errors


def assert_same_steps(actual: Path, expected: Path) -> None:
    records = []
    for directory in (actual, expected):
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        records.append({line["step"]: line for line in lines if "train/loss" in line})
    assert sorted(records[0]) == sorted(records[1]) == [1, 2, 3, 4]
    for step, record in records[1].items():
        assert records[0][step]["train/reward"] == record["train/reward"]
        assert records[0][step]["train/loss"] == pytest.approx(record["train/loss"], rel=1e-3, abs=1e-5)


def test_job_survives_the_loss_of_a_generation_node(nodes: Cluster, tmp_path: Path) -> None:
    layout = ("cluster.generation.num_nodes=2", "cluster.generation.cpu_workers_per_node=1")
    code, errors = finish(start(tmp_path / "uninterrupted", nodes, *layout))
    assert code == 0, errors[-3000:]
    job = start(tmp_path / "run", nodes, *layout)
    wait_for_checkpoint(tmp_path / "run", 2, job)
    nodes.remove_node(nodes.second, allow_graceful=False)
    code, errors = finish(job)
    assert code == 0, errors[-3000:]
    assert "(generation-1-0)" in errors, "the job must name the lost worker"
    assert_same_steps(tmp_path / "run", tmp_path / "uninterrupted")


def test_loss_of_a_policy_node_stops_the_job_which_can_resume(nodes: Cluster, tmp_path: Path) -> None:
    layout = ("cluster.num_nodes=2", "cluster.cpu_workers_per_node=1", "policy.generation.num_workers=1")
    code, errors = finish(start(tmp_path / "uninterrupted", nodes, *layout))
    assert code == 0, errors[-3000:]
    job = start(tmp_path / "run", nodes, *layout)
    wait_for_checkpoint(tmp_path / "run", 2, job)
    nodes.remove_node(nodes.second, allow_graceful=False)
    code, errors = finish(job)
    assert code == 1, "the job must end although the other rank waits for the lost rank"
    assert "policy" in errors
    nodes.add_node(num_cpus=2, include_dashboard=False)
    code, errors = finish(start(tmp_path / "run", nodes, *layout))
    assert code == 0, errors[-3000:]
    assert_same_steps(tmp_path / "run", tmp_path / "uninterrupted")


def test_episodes_of_a_lost_node_are_repeated(nodes: Cluster, tmp_path: Path) -> None:
    """One of two workers of an environment is lost with its node. Every episode of every step is trained on."""
    directory, steps = tmp_path / "run", tmp_path / "steps"
    steps.mkdir()
    job = start(
        directory,
        nodes,
        "env.sums.class=episode_tasks.TwoSums",
        "env.sums.config.step_s=2",
        f"env.sums.config.step_dir={steps}",
        "env.sums.data.train.kind=seeds",
        f"env.sums.runtime_env={{env_vars: {{PYTHONPATH: {Path(__file__).parent}}}}}",
        "env.sums.num_replicas=2",
        "env.sums.max_restarts=0",  # the loss of a node does not count
    )
    wait_for_checkpoint(directory, 1, job)
    workers = [r for r in json.loads((directory / "attestation.json").read_text()) if r["group"] == "environment sums"]
    assert len({worker["node_id"] for worker in workers}) == 2
    [lost] = [worker["pid"] for worker in workers if worker["node_id"] == nodes.second.node_id]
    (steps / str(lost)).unlink()
    while not (steps / str(lost)).exists():  # a step on the second node has begun
        assert job.poll() is None, f"the job ended early: {job.communicate()[1][-3000:]}"
        time.sleep(0.05)
    nodes.remove_node(nodes.second, allow_graceful=False)
    code, errors = finish(job)
    assert code == 0, errors[-3000:]
    records = [json.loads(line) for line in (directory / "episodes.jsonl").read_text().splitlines()]
    assert Counter(record["step"] for record in records) == dict.fromkeys((1, 2, 3, 4), 16)
    assert {(record["end"], record["outcome"]) for record in records} == {("done", "trained")}
    repeated = [record for record in records if record["attempts"] > 1]
    assert repeated
    assert {record["attempts"] for record in repeated} == {2}
    assert all("the worker of episode_tasks.TwoSums" in record["failure"] for record in repeated)
