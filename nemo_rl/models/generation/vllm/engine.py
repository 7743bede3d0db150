"""vLLM's engine in this process, shared by several threads: every output reaches the listener of its request.

::

    thread that completes prompts ──add, step──┐                   ┌──► listener of each request
    threads of the HTTP server ──add───────────┤                   │
    its stepping thread ──wait, step───────────┼─► engine ──step───┤
    thread that loads weights ──turn───────────┘  (one at a time)  └──► listener of each request

The thread that completes prompts adds its requests and steps until they have ended. Nobody waits in a step for the
requests of HTTP clients: they are unattended, and the stepping thread sleeps until a step can compute one. They wait in
the engine while it has no weights and while it sleeps.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vllm import EngineArgs, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from nemo_rl.errors import ModelError

# Called with each output of a request, or with the error of a failed step.
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
    """Holds the engine and its requests. Hold the `turn` while you use any other method or attribute but `wait`.

    Attributes:
        is_asleep: Whether GPU memory of the engine is released; see `sleep`.
        error: The error of the step that has failed. vLLM's engine is then in an unknown state and not used any more.
            Also set by `shutdown`.
    """

    def __init__(self, arguments: EngineArgs) -> None:
        self.llm: Any = LLMEngine.from_engine_args(arguments)
        [self.model] = self.llm.apply_model(lambda model: model)
        [self.worker] = self.llm.collective_rpc(lambda worker: worker)
        self.is_asleep = False
        self._has_weights = False
        self.error: Exception | None = None
        self._listeners: dict[str, Listener] = {}
        self._unattended: set[str] = set()
        self._numbers = itertools.count(1)
        self._queue, self._in_use = threading.Lock(), threading.Lock()
        # Set at the end of each turn, so that no change of what `needs_step` depends on can be missed.
        self._step_needed = threading.Event()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Use the engine exclusively. A waiting thread comes next; a plain lock could starve it."""
        with self._queue:
            self._in_use.acquire()
        try:
            yield
        finally:
            if self.needs_step:
                self._step_needed.set()
            else:
                self._step_needed.clear()
            self._in_use.release()

    def wait(self) -> None:
        """Wait until `needs_step`. Check it again in your turn: another thread may have come first."""
        self._step_needed.wait()

    @property
    def needs_step(self) -> bool:
        """Whether there are unattended requests, and a step can compute them now."""
        return bool(self._unattended) and self._has_weights and not self.is_asleep and self.error is None

    @property
    def is_busy(self) -> bool:
        """Whether there are requests that have not ended."""
        return bool(self._listeners)

    def set_loaded(self, loaded: bool) -> None:
        """Say whether the model has weights to compute with. Initially it has none."""
        self._has_weights = loaded

    def add(self, prompt: Any, params: SamplingParams, listener: Listener, *, attended: bool) -> str:
        """Add a request; returns its id.

        The id is chosen here. HTTP clients choose theirs freely: two could be equal.

        Args:
            prompt, params: See vLLM's `LLMEngine.add_request`.
            listener: Receives the request's outputs, in the thread that calls `step`.
            attended: Whether the caller calls `step` until the request has ended.
        """
        self._check()
        request_id = f"request {next(self._numbers)}"
        self.llm.add_request(request_id, prompt, params)
        self._listeners[request_id] = listener
        if not attended:
            self._unattended.add(request_id)
        return request_id

    def step(self) -> None:
        """Run one step for all requests. If it fails, all of them end with its error."""
        self._check()
        try:
            outputs = self.llm.step()
        except Exception as error:
            self._end(error)
            raise
        for output in outputs:
            request_id = output.request_id
            listener = self._remove(request_id) if output.finished else self._listeners[request_id]
            listener(output)

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Cancel those of the requests that have not ended."""
        running = [request_id for request_id in request_ids if request_id in self._listeners]
        for request_id in running:
            self._remove(request_id)
        self.llm.abort_request(running)

    def _check(self) -> None:
        """Raise `ModelError` if a step has failed."""
        if self.error is not None:
            raise ModelError(f"vLLM's engine has ended: {self.error}") from self.error

    def _end(self, error: Exception) -> None:
        self.error = error
        for request_id in list(self._listeners):
            self._remove(request_id)(error)

    def _remove(self, request_id: str) -> Listener:
        self._unattended.discard(request_id)
        return self._listeners.pop(request_id)

    def drop_keys_and_values(self) -> bool:
        """Drop all keys and values that the previous weights have computed. Running requests compute theirs again.

        Returns whether nothing is left.
        """
        dropped: bool = self.llm.reset_prefix_cache(reset_running_requests=self.is_busy)
        return dropped

    def sleep(self, level: int) -> None:
        """Release GPU memory. The requests keep their tokens, wait, and compute keys and values again after `wake`."""
        self.is_asleep = True
        self.llm.sleep(level, mode="keep")  # by default, vLLM drops running requests without an output

    def wake(self, tags: list[str] | None) -> None:
        """Allocate "weights", "kv_cache" or, with None, both again."""
        self.is_asleep = not self.llm.wake_up(tags)

    def shutdown(self) -> None:
        """End all requests, and release resources that would outlive the process (shared memory, process groups)."""
        self._end(RuntimeError("it was shut down"))
        self.llm.engine_core.shutdown()
