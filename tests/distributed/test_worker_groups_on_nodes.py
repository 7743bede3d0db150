"""Worker groups on several nodes that share a venv directory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.distributed.worker_groups import RayWorkerBuilder, RayWorkerGroup
from nemo_rl.errors import CallCancelledError

SOURCES = Path(__file__).with_name("worker_sources")


@pytest.mark.slow
def test_group_on_two_nodes_then_three(
    start_nodes: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_RL_VENV_DIR", str(tmp_path / "venvs"))
    monkeypatch.setenv("NEMO_RL_CACHE_DIR", str(tmp_path / "cache"))
    nodes = start_nodes({"num_cpus": 2}, {"num_cpus": 1})
    builder = RayWorkerBuilder(
        "sample_workers.Probe",
        py_executable=sys.executable,
        runtime_env={"env_vars": {"PYTHONPATH": str(SOURCES)}, "uv": ["packaging==23.2"]},
    )
    with RayVirtualCluster([2, 1], use_gpus=False) as cluster:
        group = RayWorkerGroup(cluster, builder)
        variables = group.get_all_worker_results(group.run_all_workers_single_data("environment"))
        assert [(v["RANK"], v["LOCAL_RANK"], v["NODE_RANK"]) for v in variables] == [
            ("0", "0", "0"),
            ("1", "1", "0"),
            ("2", "0", "1"),
        ]
        by_rank = [entry["node_id"] for entry in group.attestation]
        assert by_rank[0] == by_rank[1] != by_rank[2]
        sleeping = group.run_all_workers_single_data("sleep", seconds=3600.0)
        assert group.cancel(timeout=600.0)  # a process on the second node interrupts the worker there
        for reference in sleeping:
            with pytest.raises(CallCancelledError):
                group.get_all_worker_results([reference])
        assert group.shutdown()
    nodes.add_node(num_cpus=2)
    with RayVirtualCluster([2, 1, 2], use_gpus=False, placement_group_strategy="STRICT_SPREAD") as cluster:
        group = RayWorkerGroup(cluster, builder, workers_per_node=1)
        assert len({entry["node_id"] for entry in group.attestation}) == 3
        versions = group.run_all_workers_single_data("version", distribution="packaging")
        assert ray.get(versions) == ["23.2"] * 3
        assert group.shutdown()
