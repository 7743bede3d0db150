"""Calls the plugin's worker: `uv run python examples/plugin/run_distance.py`."""

from nemo_rl.distributed.virtual_cluster import RayVirtualCluster, init_ray
from nemo_rl.distributed.worker_groups import RayWorkerBuilder, RayWorkerGroup

WORDS = [("kitten", "sitting"), ("flaw", "lawn")]

if __name__ == "__main__":
    init_ray()
    with RayVirtualCluster([len(WORDS)], use_gpus=False) as cluster:
        group = RayWorkerGroup(cluster, RayWorkerBuilder("nemo_rl_plugin.distance_worker.DistanceWorker"))
        left, right = map(list, zip(*WORDS, strict=True))
        print(group.get_all_worker_results(group.run_all_workers_multiple_data("distance", left=left, right=right)))
        group.shutdown()
