"""Compare pairs of words, each in a worker process of its own: `uv run run.py`."""

from nemo_rl.distributed.virtual_cluster import RayVirtualCluster, init_ray
from nemo_rl.distributed.worker_groups import RayWorkerBuilder, RayWorkerGroup

PAIRS = [("kitten", "sitting"), ("flaw", "lawn")]

if __name__ == "__main__":
    init_ray()
    with RayVirtualCluster([len(PAIRS)], use_gpus=False) as cluster:
        builder = RayWorkerBuilder("my_project.distance_worker.DistanceWorker")
        group = RayWorkerGroup(cluster, builder)
        left, right = map(list, zip(*PAIRS))
        calls = group.run_all_workers_multiple_data("distance", left=left, right=right)
        print(group.get_all_worker_results(calls))
        group.shutdown()
