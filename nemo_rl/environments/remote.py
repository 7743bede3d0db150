"""An environment in a process of its own, seen from the driver."""

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
    """The configured environment as one Ray actor that takes no CPU of the job's bundles.

    It runs on the driver's node: so it is lost with no other.

    The constructor returns at once; `wait_ready`, or the first use, waits for the actor.
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        self.fqn = environment_fqn(config.name)
        builder = RayWorkerBuilder(self.fqn, **config.actor_kwargs())
        # Not soft: Ray 2.60 takes no notice of a soft affinity of an actor without CPUs.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._stopped = threading.Event()
        self._starting: Future[ActorHandle] = builder.create_worker_async(
            None, -1, 0, num_cpus=0, scheduling_strategy=here, stopped=self._stopped
        )
        self._is_shut_down = False

    def wait_ready(self) -> None:
        """Wait for the actor. Raises `WorkerStartError` when it cannot be started."""
        self._starting.result()

    def attestation(self) -> list[dict[str, Any]]:
        """Which process of which venv the environment runs in: one record."""
        return [self._call(ATTEST_METHOD)]

    def step(self, completions: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> EnvironmentReturn:
        """See `EnvironmentInterface.step`; an actor that has died is an `EnvironmentFailure` too."""
        return self._call("step", list(completions), list(metadata))

    def global_post_process_and_metrics(self, result: EnvironmentReturn) -> tuple[EnvironmentReturn, dict[str, float]]:
        """See `EnvironmentInterface`."""
        return self._call("global_post_process_and_metrics", result)

    def shutdown(self) -> None:
        """Stop the environment and its actor. Nothing uses Ray any more when it returns."""
        if self._is_shut_down:
            return
        self._is_shut_down = True
        self._stopped.set()
        if self._starting.exception() is not None:  # of a start that is still under way: it ends soon
            return
        actor = self._starting.result()
        with contextlib.suppress(RayError, EnvironmentFailure):  # it is killed now in any case
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
