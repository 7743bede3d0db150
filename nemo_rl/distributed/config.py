"""The `cluster` section of a configuration."""

from __future__ import annotations

from pydantic import Field

from nemo_rl.utils.config import ConfigModel


class BundlesConfig(ConfigModel):
    """Nodes, with one bundle for each accelerator used."""

    num_nodes: int = Field(1, ge=1, description="Number of nodes.")
    gpus_per_node: int = Field(0, ge=0, description="GPUs used on each node; 0 runs on CPUs.")
    cpu_workers_per_node: int = Field(
        1, ge=1, description="Workers on each node, with one CPU each, if gpus_per_node is 0."
    )

    @property
    def use_gpus(self) -> bool:
        """Whether the bundles have GPUs."""
        return self.gpus_per_node > 0

    @property
    def workers_per_node(self) -> int:
        """Bundles of one node: one per GPU, or one per CPU worker without GPUs."""
        return self.gpus_per_node or self.cpu_workers_per_node

    @property
    def num_workers(self) -> int:
        """Bundles of all nodes together."""
        return self.num_nodes * self.workers_per_node


class ClusterConfig(BundlesConfig):
    """The nodes and accelerators of a job: of the policy, and of generation if it has separate ones."""

    generation: BundlesConfig | None = Field(
        None, description="Bundles of generation. Null: generation shares the bundles of the policy."
    )

    @property
    def for_generation(self) -> BundlesConfig:
        """The bundles that generation runs on."""
        return self.generation or self
