"""The checks of `nemo-rl doctor`, on every node of a running cluster."""

from __future__ import annotations

import ray
from ray.exceptions import GetTimeoutError, RayError

from nemo_rl import settings
from nemo_rl.cli.checks import FATAL, Check, run_checks
from nemo_rl.distributed.nodes import alive_nodes, ask_nodes
from nemo_rl.distributed.ray_session import init_ray
from nemo_rl.errors import ConfigError

_TIMEOUT_S = 120.0


def check_nodes() -> dict[str, list[Check]]:
    """Checks by node address. A node that does not answer has one fatal finding. Raises `ClusterError`."""
    if settings.RAY_ADDRESS.get() in (None, "local"):
        raise ConfigError("--cluster looks at a running cluster: set RAY_ADDRESS to host:port of its head.")
    init_ray()
    try:
        answers = ask_nodes(run_checks, alive_nodes(), timeout_s=_TIMEOUT_S)
        return {node.address: _checks(answer) for node, answer in answers}
    finally:
        ray.shutdown()


def _checks(answer: list[Check] | RayError) -> list[Check]:
    if not isinstance(answer, RayError):
        return answer
    why = str(answer).strip().rpartition("\n")[2]
    if isinstance(answer, GetTimeoutError):
        why = f"no answer within {_TIMEOUT_S:.0f} s"
    return [Check("node", FATAL, why, "see this node's logs; take it out of the cluster until it answers")]
