"""Which workers a GRPO job has: class, Python and number, decided by the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.distributed.ray_actor_environment_registry import get_actor_python_env
from nemo_rl.environments.registry import environment_fqn
from nemo_rl.models.generation.registry import generation_fqn
from nemo_rl.models.policy.registry import policy_worker_fqn


@dataclass(frozen=True)
class Role:
    """One worker group of a job.

    Attributes:
        name: "policy", "generation" or "environment".
        fqn: fully qualified name of the worker class; also the name of its venv.
        py_executable: the Python it runs in.
        num_workers: over all nodes.
        share: part of its bundle (a GPU, or a CPU) that one worker takes; 0 for workers outside the bundles.
    """

    name: str
    fqn: str
    py_executable: str
    num_workers: int
    share: float


def job_roles(config: MasterConfig) -> list[Role]:
    """The roles of a job. Raises `ConfigError` or `UnregisteredActorError` for a name that nobody knows."""
    generation_workers = config.policy.generation.num_workers or config.cluster.num_workers
    specs = [
        ("policy", policy_worker_fqn(config.policy.backend), config.cluster.num_workers, 0.5),
        ("generation", generation_fqn(config.policy.generation.backend), generation_workers, 0.5),
        ("environment", environment_fqn(config.env.name), 1, 0.0),
    ]
    return [Role(name, fqn, get_actor_python_env(fqn), count, share) for name, fqn, count, share in specs]
