"""Calls of a function on nodes of the Ray cluster. The nodes must have the source of this package."""

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
    """Call a function once on each of the given nodes, in parallel.

    The calls reserve no CPU, so that fully occupied nodes answer too. They are not retried when their process dies.

    Args:
        function: what to call.
        arguments: the positional arguments for each node, by node id.
        options: returns additional Ray task options for a node id.

    Returns:
        The pending results, by node id.
    """
    task: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    return {
        node_id: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            **(options(node_id) if options is not None else {}),
        ).remote(*node_arguments)
        for node_id, node_arguments in arguments.items()
    }


def collect_answers(calls: Mapping[str, ray.ObjectRef[T]], timeout_s: float) -> dict[str, T | RayError]:
    """Wait at most `timeout_s` seconds for all calls, then cancel the late ones and end their processes.

    Returns:
        By node id the answer, or the error: what the function raised, or `GetTimeoutError`.
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
