"""The checks of `nemo-rl doctor`, on every node of a running cluster."""

from __future__ import annotations

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nemo_rl import settings
from nemo_rl.cli.checks import FATAL, Check, run_checks
from nemo_rl.distributed.nodes import alive_nodes
from nemo_rl.distributed.ray_session import init_ray
from nemo_rl.errors import ConfigError

_TIMEOUT_S = 120.0


def check_nodes() -> dict[str, list[Check]]:
    """Checks by node address. A node that does not answer has one fatal finding. Raises `ClusterError`."""
    if settings.RAY_ADDRESS.get() in (None, "local"):
        raise ConfigError("--cluster looks at a running cluster: set RAY_ADDRESS to host:port of its head.")
    init_ray()
    try:
        # No CPUs: a cluster that is full must answer, too.
        task = ray.remote(num_cpus=0, max_retries=0)(run_checks)
        pending = {
            node.address: task.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            ).remote()
            for node in alive_nodes()
        }
        ray.wait(list(pending.values()), num_returns=len(pending), timeout=_TIMEOUT_S)
        return {address: _result(reference) for address, reference in pending.items()}
    finally:
        ray.shutdown()


def _result(reference: ray.ObjectRef) -> list[Check]:
    try:
        return ray.get(reference, timeout=0)
    except ray.exceptions.GetTimeoutError:
        why = f"no answer within {_TIMEOUT_S:.0f} s"
    except ray.exceptions.RayError as error:
        why = str(error).strip().rpartition("\n")[2]
    return [Check("node", FATAL, why, "see this node's logs; take it out of the cluster until it answers")]
