"""Derives the worker groups of a GRPO job from its configuration: class, Python and number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.distributed.ray_actor_environment_registry import get_actor_python_env
from nemo_rl.environments.registry import entry_fqn, entry_python, environment_fqn
from nemo_rl.errors import ConfigError, WeightSyncError
from nemo_rl.models.backends import generation_backend, policy_backend
from nemo_rl.models.generation.replicas import replica_bundles
from nemo_rl.venvs import check_extras, parse_py_executable

if TYPE_CHECKING:
    from nemo_rl.distributed.config import BundlesConfig
    from nemo_rl.environments.config import EnvironmentConfig
    from nemo_rl.models.weights.routes import Place


@dataclass(frozen=True)
class Role:
    """Describes one worker group of a job.

    Attributes:
        name: "policy", "generation", or "environment" (with turns: "environment <name>").
        fqn: fully qualified name of the worker class, which is also the name of its venv.
        py_executable: the Python of its workers.
        num_workers: number of workers on all nodes.
        share: fraction of a bundle (a GPU or a CPU) per worker; 0 for workers outside the bundles.
    """

    name: str
    fqn: str
    py_executable: str
    num_workers: int
    share: float


def num_colocated_groups(config: MasterConfig) -> int:
    """Return the number of worker groups that share the policy's bundles."""
    return 2 if config.cluster.generation is None else 1


def job_roles(config: MasterConfig) -> list[Role]:
    """Return the roles of a job.

    Raises:
        ConfigError: an unknown back end or environment.
        UnregisteredActorError: the class of an environment is not registered.
        UnknownExtraError: the project lacks the extra of a role.
    """
    policy, generation, cluster = config.policy, config.policy.generation, config.cluster
    trainer, generator = policy_backend(policy.backend), generation_backend(generation.backend)
    policy_python = trainer.py_executable(policy.py_executable, use_gpus=cluster.use_gpus)
    generation_python = generator.py_executable(generation.py_executable, use_gpus=cluster.for_generation.use_gpus)
    part = cluster.for_generation
    num_generators = generation.num_workers or part.num_workers
    replica_bundles(
        [part.workers_per_node] * part.num_nodes, generation.num_workers, generation.options.workers_per_replica
    )  # raises if the numbers do not fit
    share = 1 / num_colocated_groups(config)
    roles = [
        Role("policy", trainer.fqn, policy_python, cluster.num_workers, share),
        Role("generation", generator.fqn, generation_python, num_generators, share),
        *environment_roles(config.env),
    ]
    for role in roles:
        check_extras(parse_py_executable(role.py_executable))
    return roles


def environment_roles(config: EnvironmentConfig) -> list[Role]:
    """Return the roles of the environments. Raises the errors of `job_roles`."""
    entries = config.entries()
    if not entries:
        fqn = environment_fqn(config.name)
        return [Role("environment", fqn, get_actor_python_env(fqn), 1, 0.0)]
    return [
        Role(f"environment {name}", entry_fqn(entry), entry_python(entry), entry.num_replicas, 0.0)
        for name, entry in entries.items()
    ]


def role_venvs(roles: Sequence[Role]) -> dict[str, str]:
    """Return the py_executable of each venv that the roles need, by the venv's name: the class that runs in it.

    Two environments may run one class with different Pythons. The second venv is then named after its role, too.
    """
    venvs: dict[str, str] = {}
    for role in roles:
        taken = venvs.get(role.fqn, role.py_executable) != role.py_executable
        venvs[f"{role.fqn}-{role.name.split()[-1]}" if taken else role.fqn] = role.py_executable
    return venvs


def check_weight_route(config: MasterConfig) -> None:
    """Raise `ConfigError` for a `policy.weight_transport` that is unknown or cannot reach all workers.

    The nodes are not known yet, so the check assumes that policy, generation and driver share nodes.
    """
    transport, cluster = config.policy.weight_transport, config.cluster
    if transport == "auto":
        return
    from nemo_rl.models.weights.routes import choose_route  # imports torch

    policy = _places(cluster, "policy")
    generation = policy if cluster.generation is None else _places(cluster.generation, "generation")
    try:
        choose_route(transport, policy=policy, generation=generation, driver_node_id=policy[0].node_id)
    except WeightSyncError as error:
        raise ConfigError(f"policy.weight_transport: {error}") from error


def _places(part: BundlesConfig, owner: str) -> list[Place]:
    from nemo_rl.models.weights.routes import Place

    return [
        Place(f"node {node}", f"{owner} {index}" if part.use_gpus else None)
        for node in range(part.num_nodes)
        for index in range(part.workers_per_node)
    ]
