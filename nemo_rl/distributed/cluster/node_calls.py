"""Calls of a function on nodes of the cluster, and their answers. `nodes` sees to it that they have the source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

T = TypeVar("T")


def call_on_nodes(
    function: Callable[..., T],
    arguments: Mapping[str, tuple[Any, ...]],
    options: Callable[[str], Mapping[str, Any]] | None = None,
) -> dict[str, ray.ObjectRef[T]]:
    """Call a function once on each of some nodes, at the same time.

    The calls hold no CPU, so that a node that is full answers too, and are not repeated when their process dies.

    Args:
        arguments: of the call on each node, by node id.
        options: more options of the Ray task on a node, by its id.

    Returns:
        The results to come, by node id.
    """
    task: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    return {
        node_id: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            **(options(node_id) if options is not None else {}),
        ).remote(*own)
        for node_id, own in arguments.items()
    }


def collect_answers(calls: Mapping[str, ray.ObjectRef[T]], timeout_s: float) -> dict[str, T | RayError]:
    """Wait for all calls together, at most `timeout_s` seconds; what is late is given up, and its process ended.

    Returns:
        By node id the answer, or why there is none: what the function raised, or `GetTimeoutError`.
    """
    pending: list[Any] = list(calls.values())
    if pending:
        ray.wait(pending, num_returns=len(pending), timeout=timeout_s)
    return {node_id: _answer(reference) for node_id, reference in calls.items()}


def _answer(reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=0)
    except GetTimeoutError as error:
        ray.cancel(reference, force=True)
        return error
    except RayError as error:
        return error
