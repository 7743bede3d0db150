"""Starts the workers of an environment: their Python, their place in the cluster, and the check of both."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nemo_rl import settings
from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES
from nemo_rl.distributed.worker_groups import RayWorkerBuilder
from nemo_rl.distributed.workers.host import ATTEST_METHOD
from nemo_rl.distributed.workers.launch_plan import WorkerPython, prepare_child_python
from nemo_rl.distributed.workers.runtime_env_fields import VENV_FIELDS
from nemo_rl.distributed.workers.startup import kill_and_wait
from nemo_rl.environments.registry import WORKER_FQN
from nemo_rl.environments.replica_nodes import ReplicaNodes
from nemo_rl.errors import AttestationError, EnvironmentFailure, ResourceInsufficientError

_THREADS = 4  # of a worker: one waits for replies, the others serve short calls


@dataclass(frozen=True)
class ReplicaStarter:
    """Starts the workers of one environment. Thread-safe.

    Attributes:
        name, fqn, config, own_process, concurrency, memory_limit_mb: see `EnvironmentGroup`.
        fields: see `registry.python_fields`.
        resources: what Ray reserves for each worker, by the name of the resource ("CPU", "GPU"); none of them is 0.
        nodes: chooses the node of a worker that reserves nothing.
    """

    name: str
    fqn: str
    config: Mapping[str, Any]
    fields: Mapping[str, Any]
    own_process: bool
    resources: Mapping[str, float]
    concurrency: int
    memory_limit_mb: int | None
    nodes: ReplicaNodes

    def start(self, index: int, stopped: threading.Event) -> ActorHandle:
        """Start the worker `index`, or its replacement. Set `stopped` to abort the start.

        Raises:
            ResourceInsufficientError: No node has the resources of a worker.
            Exception: What `RayWorkerBuilder` raises.
        """
        self._check_resources()
        fields, child = dict(self.fields), WorkerPython()
        if self.own_process:
            child = prepare_child_python(self.fqn, fields)
            fields = {name: value for name, value in fields.items() if name not in VENV_FIELDS}
            fields["py_executable"] = PY_EXECUTABLES.SYSTEM
        if "GPU" not in self.resources:
            # Ray leaves the node's GPUs visible to a worker without GPUs, but they belong to policy and generation.
            fields["env_vars"] = {settings.CUDA_VISIBLE_DEVICES.name: "", **fields.get("env_vars", {})}
        builder = RayWorkerBuilder(
            WORKER_FQN,
            self.fqn,
            self.config,
            concurrency=self.concurrency,
            child_python=child.python,
            memory_limit_mb=self.memory_limit_mb,
            runtime_env=fields,
        )
        actor = builder(
            None,
            -1,
            self.resources.get("GPU", 0),
            num_cpus=self.resources.get("CPU", 0),
            resources={name: amount for name, amount in self.resources.items() if name not in ("CPU", "GPU")},
            max_concurrency=_THREADS,
            scheduling_strategy=self._strategy(index),
            stopped=stopped,
            label=f"env.{self.name}-{index}",
        )
        try:
            ray.get(actor.open.remote())
            record, description = ray.get([getattr(actor, ATTEST_METHOD).remote(), actor.describe.remote()])
            self.nodes.record(index, record["node_id"])
            self._check_child(description, child)
        except RayTaskError as error:
            kill_and_wait([actor])
            raise EnvironmentFailure(f"env.{self.name}.class={self.fqn}: {error.cause}") from error
        except AttestationError:
            kill_and_wait([actor])
            raise
        return actor

    def _check_resources(self) -> None:
        """Raise `ResourceInsufficientError` if no node has the resources of a worker; Ray would wait forever."""
        if not self.resources:
            return
        for node in alive_nodes():
            if all(node.total.get(name, 0) >= amount for name, amount in self.resources.items()):
                return
        needed = ", ".join(f"{amount:g} {name}" for name, amount in self.resources.items())
        raise ResourceInsufficientError(
            f"a worker needs {needed} on one node, and no node of the cluster has that; lower num_cpus, num_gpus or "
            f"resources of env.{self.name}, or add a node"
        )

    def _strategy(self, index: int) -> Any:
        if self.resources:
            return "SPREAD"  # over the nodes where they are free
        # Not soft: Ray 2.60 ignores a soft affinity of an actor without CPUs.
        return NodeAffinitySchedulingStrategy(self.nodes.choose(index), soft=False)

    def _check_child(self, description: Mapping[str, Any], child: WorkerPython) -> None:
        """Raise `AttestationError` if a child process runs in another venv than the planned one."""
        if child.digest is not None and description["venv_digest"] != child.digest:
            raise AttestationError(
                f"the process of env.{self.name} (pid {description['pid']}) runs {description['executable']}: "
                f"venv_digest: expected {child.digest}, found {description['venv_digest']}. Its venv was changed or "
                "replaced while the job started; start the job again."
            )
