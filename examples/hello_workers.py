"""Call one worker class in two venvs with conflicting versions of a package.

uv run examples/hello_workers.py
"""

import sys
from importlib.metadata import version

from nemo_rl.distributed.virtual_cluster import RayVirtualCluster, init_ray
from nemo_rl.distributed.worker_groups import RayWorkerBuilder, RayWorkerGroup


class VersionWorker:
    def installed(self, package: str) -> str:
        return f"{package} {version(package)}"


if __name__ == "__main__":
    init_ray()
    cluster = RayVirtualCluster([1], use_gpus=False, max_colocated_worker_groups=2)
    groups = []
    for pin in ["packaging==23.2", "packaging==24.2"]:
        builder = RayWorkerBuilder(
            "hello_workers.VersionWorker",  # named here, imported by the workers only
            py_executable=sys.executable,  # the base: the driver's own venv
            runtime_env={"uv": [pin]},  # an overlay on it with one package
        )
        groups.append(RayWorkerGroup(cluster, builder))
    for group in groups:
        calls = group.run_all_workers_single_data("installed", package="packaging")
        print(group.get_all_worker_results(calls))
        group.shutdown()
    cluster.shutdown()
