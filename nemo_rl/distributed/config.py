"""The `cluster` section of a configuration."""

from __future__ import annotations

from pydantic import Field

from nemo_rl.utils.config import ConfigModel


class ClusterConfig(ConfigModel):
    """How many nodes and accelerators a job takes."""

    num_nodes: int = Field(1, ge=1, description="Nodes to run on.")
    gpus_per_node: int = Field(0, ge=0, description="GPUs to use on each node; 0 runs on CPUs.")
    cpu_workers_per_node: int = Field(
        1, ge=1, description="Policy workers on each node when gpus_per_node is 0 (data parallel)."
    )

    @property
    def workers_per_node(self) -> int:
        """Bundles of one node: a GPU each, or a CPU each where there are no GPUs."""
        return self.gpus_per_node or self.cpu_workers_per_node

    @property
    def num_workers(self) -> int:
        """Bundles of all nodes: the data-parallel size of the policy."""
        return self.num_nodes * self.workers_per_node
