"""vLLM's own engine in this process, for several users: whoever makes it step, outputs reach those who asked for them.

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


def explained(refusal: Exception, *, on_cpu: bool) -> str:
    """What vLLM says when it does not start, and the option for it: of too little memory it names that for GPUs."""
    said = str(refusal)
    if not on_cpu or "gpu_memory_utilization" not in said:
        return said
    return f"{said} On CPUs, set policy.generation.options.cpu_kv_cache_gib instead"


class SharedEngine:
    """The engine and the requests that it works on. Everything but `turn` is for whoever has it."""

    def __init__(self, arguments: EngineArgs) -> None:
        self.llm: Any = LLMEngine.from_engine_args(arguments)
        [self.model] = self.llm.apply_model(lambda model: model)
        [self.worker] = self.llm.collective_rpc(lambda worker: worker)
        self._listeners: dict[str, Listener] = {}
        self._queue, self._in_use = threading.Lock(), threading.Lock()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Have the engine alone. Whoever waits comes next: a plain lock would go back to the thread that steps."""
        with self._queue:
            self._in_use.acquire()
        try:
            yield
        finally:
            self._in_use.release()

    @property
    def is_busy(self) -> bool:
        """Whether there are requests."""
        return bool(self._listeners)

    def add(self, request: str, prompt: Any, params: SamplingParams, listener: Listener) -> None:
        """Take a request; `listener` gets its outputs as the engine gives them, in the thread that makes it step."""
        self._listeners[request] = listener
        self.llm.add_request(request, prompt, params)

    def step(self) -> None:
        """One step, for all requests."""
        for output in self.llm.step():
            request = output.request_id
            listener = self._listeners.pop(request) if output.finished else self._listeners[request]
            listener(output)

    def cancel(self, requests: Iterable[str]) -> None:
        """Drop those of the requests that have not ended."""
        unfinished = [request for request in requests if self._listeners.pop(request, None) is not None]
        self.llm.abort_request(unfinished)

    def forget_keys_and_values(self) -> bool:
        """Let go of everything that the weights until now have computed. Requests go on: theirs is computed anew.

        Returns whether nothing is left.
        """
        forgotten: bool = self.llm.reset_prefix_cache(reset_running_requests=self.is_busy)
        return forgotten

    def shutdown(self) -> None:
        """Let go of what outlives the process otherwise (shared memory, process groups)."""
        self.llm.engine_core.shutdown()
