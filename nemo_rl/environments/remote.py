"""The driver's handle of an environment that runs in its own process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nemo_rl.distributed.futures import WORKER_DEATHS
from nemo_rl.distributed.worker_groups import RayWorkerBuilder
from nemo_rl.distributed.workers.host import ATTEST_METHOD
from nemo_rl.environments.config import EnvironmentConfig
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn
from nemo_rl.environments.registry import environment_fqn
from nemo_rl.errors import EnvironmentFailure


class RemoteEnvironment(EnvironmentInterface):
    """Runs the configured environment as one Ray actor that takes no CPU of the job's bundles.

    The actor runs on the driver's node, so the loss of another node does not affect it. The constructor returns at
    once; `wait_ready`, or the first call, waits for the actor.

    Example:

        environment = RemoteEnvironment(EnvironmentConfig(name="math"))
        result = environment.step(["\\boxed{4}"], [{"ground_truth": "4"}])
        environment.shutdown()
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        self.fqn = environment_fqn(config.name)
        builder = RayWorkerBuilder(self.fqn, **config.actor_kwargs())
        # Not soft: Ray 2.60 ignores a soft affinity of an actor without CPUs.
        driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._stopped = threading.Event()
        self._starting: Future[ActorHandle] = builder.create_worker_async(
            None,
            -1,
            0,
            num_cpus=0,
            scheduling_strategy=driver_node,
            stopped=self._stopped,
            label=f"env.{config.name}",
        )
        self._is_shut_down = False

    def wait_ready(self) -> None:
        """Wait for the actor, and let it prepare. Raises `WorkerStartError` if it cannot be started."""
        prepare = getattr(self._starting.result(), "prepare", None)
        if prepare is not None:
            prepare.remote()

    def attestation(self) -> list[dict[str, Any]]:
        """Return one record: the process and venv that the environment runs in."""
        return [self._call(ATTEST_METHOD)]

    def step(self, completions: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> EnvironmentReturn:
        """See `EnvironmentInterface.step`. A dead actor also raises `EnvironmentFailure`."""
        return self._call("step", list(completions), list(metadata))

    def global_post_process_and_metrics(self, result: EnvironmentReturn) -> tuple[EnvironmentReturn, dict[str, float]]:
        """See `EnvironmentInterface.global_post_process_and_metrics`."""
        return self._call("global_post_process_and_metrics", result)

    def shutdown(self) -> None:
        """Stop the environment and its actor. Ray is no longer used when this returns."""
        if self._is_shut_down:
            return
        self._is_shut_down = True
        self._stopped.set()
        if self._starting.exception() is not None:  # waits for a start that is still running; it ends soon
            return
        actor = self._starting.result()
        with contextlib.suppress(RayError, EnvironmentFailure):  # the actor is killed below in any case
            ray.get(actor.shutdown.remote(), timeout=10)
        ray.kill(actor)

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(self._starting.result(), method).remote(*arguments))
        except WORKER_DEATHS as error:
            raise EnvironmentFailure(f"the environment {self.fqn} has died: {error}") from error
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, EnvironmentFailure):
                raise cause from error
            raise EnvironmentFailure(f"the environment {self.fqn} failed in {method}: {cause!r}") from error
