"""vLLM's engine in this process, shared by several threads: every output reaches the listener of its request.

::

    thread that completes prompts ──add──┐                    ┌──► listener of each request
    threads of the HTTP server ────add───┼─► engine ──step────┤
    thread that loads weights ──turn─────┘   (one at a time)  └──► listener of each request
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vllm import EngineArgs, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

Listener = Callable[[Any], None]


def start_error(error: Exception, *, on_cpu: bool) -> str:
    """Return vLLM's message, with this project's option if too little memory on CPUs is the cause.

    vLLM itself names its option for GPUs.
    """
    message = str(error)
    if not on_cpu or "gpu_memory_utilization" not in message:
        return message
    return f"{message} On CPUs, set policy.generation.options.cpu_kv_cache_gib instead"


class SharedEngine:
    """Holds the engine and its running requests. Call every method but `turn` while you hold the `turn`."""

    def __init__(self, arguments: EngineArgs) -> None:
        self.llm: Any = LLMEngine.from_engine_args(arguments)
        [self.model] = self.llm.apply_model(lambda model: model)
        [self.worker] = self.llm.collective_rpc(lambda worker: worker)
        self._listeners: dict[str, Listener] = {}
        self._queue, self._in_use = threading.Lock(), threading.Lock()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Use the engine exclusively. A waiting thread comes next; a plain lock could starve it."""
        with self._queue:
            self._in_use.acquire()
        try:
            yield
        finally:
            self._in_use.release()

    @property
    def is_busy(self) -> bool:
        """Whether there are running requests."""
        return bool(self._listeners)

    def add(self, request_id: str, prompt: Any, params: SamplingParams, listener: Listener) -> None:
        """Add a request. `listener` receives its outputs, in the thread that calls `step`."""
        self._listeners[request_id] = listener
        self.llm.add_request(request_id, prompt, params)

    def step(self) -> None:
        """Run one step for all requests."""
        for output in self.llm.step():
            request_id = output.request_id
            listener = self._listeners.pop(request_id) if output.finished else self._listeners[request_id]
            listener(output)

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Cancel those of the requests that are still running."""
        running = [request_id for request_id in request_ids if self._listeners.pop(request_id, None) is not None]
        self.llm.abort_request(running)

    def drop_keys_and_values(self) -> bool:
        """Drop all keys and values that the previous weights have computed. Running requests compute theirs again.

        Returns whether nothing is left.
        """
        dropped: bool = self.llm.reset_prefix_cache(reset_running_requests=self.is_busy)
        return dropped

    def shutdown(self) -> None:
        """Release resources that would outlive the process (shared memory, process groups)."""
        self.llm.engine_core.shutdown()
