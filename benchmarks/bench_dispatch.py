"""Compares calls to a worker group with raw Ray calls, and with copying memory.

    uv run benchmarks/bench_dispatch.py

Eight workers run in the driver's Python. Each round repeats every kind of call a few times and takes the fastest.

| case | metric | call |
| --- | --- | --- |
| ours | same data, small | `run_all_workers_single_data(x=1)` |
| | same data, 64 MB | the same with one array of 64 MB for all |
| | sharded, 64 MB | `run_all_workers_sharded_data` with 8 slices of one array |
| raw ray | | `handle.method.remote(...)` on the same actors: one `ray.put` of the array, or one slice each |
| copy | 64 MB | copying the array into new memory: the minimum cost of a call with the array |
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import Case, Metrics, Ratio

NUM_WORKERS = 8
REPEATS_PER_ROUND = 7
WORKER = "class Worker:\n    def touch(self, x):\n        return None if isinstance(x, int) else float(x[0])\n"


def main() -> None:
    arguments = harness.parser(__doc__, repeats=5).parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-dispatch-") as scratch:
        group = _group(Path(scratch))
        data = np.random.default_rng(0).random(8 * 2**20)
        slices = np.array_split(data, NUM_WORKERS)
        cases = [
            Case("ours", lambda: _ours(group, data, slices)),
            Case("raw ray", lambda: _raw(group.workers, data, slices)),
            Case("copy", lambda: {"sharded, 64 MB": _fastest(data.copy)}),
        ]
        results = harness.measure(cases, repeats=arguments.repeats, warmups=1)
        group.shutdown()
    ratios = [
        Ratio("same data, small", "ours", "raw ray"),
        Ratio("same data, 64 MB", "ours", "raw ray"),
        Ratio("sharded, 64 MB", "ours", "raw ray"),
        Ratio("sharded, 64 MB", "ours", "copy"),
    ]
    harness.report("dispatch", results, ratios, arguments.json, title="seconds per call to 8 workers, with its results")


def _group(scratch: Path) -> Any:
    from nemo_rl.distributed.cluster.session import start_local_ray
    from nemo_rl.distributed.named_sharding import NamedSharding
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.distributed.worker_groups import RayWorkerBuilder, RayWorkerGroup

    (scratch / "bench_dispatch_workers.py").write_text(WORKER, encoding="utf-8")
    start_local_ray(num_cpus=NUM_WORKERS)
    builder = RayWorkerBuilder(
        "bench_dispatch_workers.Worker",
        py_executable=sys.executable,
        runtime_env={"env_vars": {"PYTHONPATH": str(scratch)}},
    )
    cluster = RayVirtualCluster([NUM_WORKERS], use_gpus=False)
    sharding = NamedSharding(range(NUM_WORKERS), ["data_parallel"])
    return RayWorkerGroup(cluster, builder, sharding_annotations=sharding)


def _ours(group: Any, data: np.ndarray, slices: list[np.ndarray]) -> Metrics:
    def same(x: Any) -> None:
        group.get_all_worker_results(group.run_all_workers_single_data("touch", x=x))

    def sharded() -> None:
        future = group.run_all_workers_sharded_data("touch", in_sharded_axes=["data_parallel"], x=slices)
        group.get_all_worker_results(future)

    return {
        "same data, small": _fastest(lambda: same(1)),
        "same data, 64 MB": _fastest(lambda: same(data)),
        "sharded, 64 MB": _fastest(sharded),
    }


def _raw(handles: list[Any], data: np.ndarray, slices: list[np.ndarray]) -> Metrics:
    import ray

    def same(x: Any) -> None:
        ray.get([handle.touch.remote(x) for handle in handles])

    return {
        "same data, small": _fastest(lambda: same(1)),
        "same data, 64 MB": _fastest(lambda: same(ray.put(data))),
        "sharded, 64 MB": _fastest(lambda: ray.get([h.touch.remote(x) for h, x in zip(handles, slices, strict=True)])),
    }


def _fastest(function: Any) -> float:
    return min(harness.timed(function) for _ in range(REPEATS_PER_ROUND))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
