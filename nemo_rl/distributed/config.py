"""The `cluster` section of a configuration."""

from __future__ import annotations

from pydantic import Field

from nemo_rl.utils.config import ConfigModel


class BundlesConfig(ConfigModel):
    """Nodes, and a bundle for each of their accelerators that is used."""

    num_nodes: int = Field(1, ge=1, description="Nodes to run on.")
    gpus_per_node: int = Field(0, ge=0, description="GPUs to use on each node; 0 runs on CPUs.")
    cpu_workers_per_node: int = Field(1, ge=1, description="Workers on each node when gpus_per_node is 0, a CPU each.")

    @property
    def use_gpus(self) -> bool:
        """Whether bundles have GPUs."""
        return self.gpus_per_node > 0

    @property
    def workers_per_node(self) -> int:
        """Bundles of one node: a GPU each, or a CPU each where there are no GPUs."""
        return self.gpus_per_node or self.cpu_workers_per_node

    @property
    def num_workers(self) -> int:
        """Bundles of all nodes."""
        return self.num_nodes * self.workers_per_node


class ClusterConfig(BundlesConfig):
    """How many nodes and accelerators a job takes: those of the policy."""

    generation: BundlesConfig | None = Field(
        None, description="What generation has for itself. Null: it shares the bundles of the policy."
    )

    @property
    def of_generation(self) -> BundlesConfig:
        """Where generation runs."""
        return self.generation or self
