"""Calls the plugin's worker: `uv run python examples/plugin/run_distance.py`."""

from nemo_rl.distributed.virtual_cluster import RayVirtualCluster, init_ray
from nemo_rl.distributed.worker_groups import RayWorkerBuilder, RayWorkerGroup

WORDS = [("kitten", "sitting"), ("flaw", "lawn")]

if __name__ == "__main__":
    init_ray()
    with RayVirtualCluster([len(WORDS)], use_gpus=False) as cluster:
        builder = RayWorkerBuilder("nemo_rl_plugin.distance_worker.DistanceWorker")
        group = RayWorkerGroup(cluster, builder)
        left, right = map(list, zip(*WORDS, strict=True))
        calls = group.run_all_workers_multiple_data("distance", left=left, right=right)
        print(group.get_all_worker_results(calls))
        group.shutdown()
