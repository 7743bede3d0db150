"""vLLM's engine in this process, shared by several threads: one of them runs the steps.

::

    threads that complete prompts ──add──┐                 ┌──► listener: the outputs of a step for one call
    threads of the HTTP server ─────add──┼─► engine ─step──┼──► listener
    thread that loads weights ─────turn──┤                 └──► listener
    the stepping thread ───────────step──┘  (one of them at a time)

Requests of all threads join the same batches. They wait in the engine while it has no weights and while it sleeps. The
stepping thread then sleeps, too.

All steps run in one thread, because vLLM gives each thread that computes a CUDA stream of its own. Torch's allocator
would keep separate memory for each of them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from vllm import EngineArgs, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from nemo_rl.errors import ModelError

logger = logging.getLogger(__name__)

# Called once per step with the outputs of all requests that have this listener, or once with the error that ended them.
Listener = Callable[[list[Any] | Exception], None]


def start_error(error: Exception, *, on_cpu: bool) -> str:
    """Return vLLM's message, with this project's option if too little memory on CPUs is the cause.

    vLLM itself names its option for GPUs.
    """
    message = str(error)
    if not on_cpu or "gpu_memory_utilization" not in message:
        return message
    return f"{message} On CPUs, set policy.generation.options.cpu_kv_cache_gib instead"


class SharedEngine:
    """Holds the engine and its requests. Hold the `turn` while you use any other method or attribute.

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
        self._numbers = itertools.count(1)
        self._queue, self._in_use = threading.Lock(), threading.Lock()
        # Set at the end of each turn, so that no change of what `needs_step` depends on can be missed.
        self._step_needed = threading.Event()
        threading.Thread(target=self._step_forever, name="engine steps", daemon=True).start()

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

    def _step_forever(self) -> None:
        # OpenMP keeps a number of threads for each thread that computes, and this call sets it to torch's. Without it,
        # torch does so within the first step, and vLLM's attention on CPUs fails because the number has changed.
        torch.get_num_threads()
        while True:
            self._step_needed.wait()
            with self.turn():
                if not self.needs_step:
                    continue
                try:
                    self.step()
                except Exception:  # it has ended all requests, and `add` raises it
                    logger.exception("a step of vLLM's engine failed")

    @property
    def needs_step(self) -> bool:
        """Whether there are requests, and a step can compute them now."""
        return self.is_busy and self._has_weights and not self.is_asleep and self.error is None

    @property
    def is_busy(self) -> bool:
        """Whether there are requests that have not ended."""
        return bool(self._listeners)

    def set_loaded(self, loaded: bool) -> None:
        """Say whether the model has weights to compute with. Initially it has none."""
        self._has_weights = loaded

    def add(self, prompt: Any, params: SamplingParams, listener: Listener) -> str:
        """Add a request; returns its id.

        The id is chosen here. HTTP clients choose theirs freely: two could be equal.

        Args:
            prompt, params: See vLLM's `LLMEngine.add_request`.
            listener: Receives the request's outputs, in the thread that calls `step`.

        Raises:
            ModelError: A step has failed.
        """
        self._check()
        request_id = f"request {next(self._numbers)}"
        self.llm.add_request(request_id, prompt, params)
        self._listeners[request_id] = listener
        return request_id

    def step(self) -> None:
        """Run one step for all requests. If it fails, all of them end with its error."""
        self._check()
        try:
            outputs_of: dict[Listener, list[Any]] = {}
            for output in self.llm.step():
                outputs_of.setdefault(self._listeners[output.request_id], []).append(output)
            for listener, outputs in outputs_of.items():
                listener(outputs)
                for output in outputs:
                    if output.finished:
                        del self._listeners[output.request_id]
        except Exception as error:
            self._end(error)
            raise

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Cancel those of the requests that have not ended."""
        running = [request_id for request_id in request_ids if request_id in self._listeners]
        for request_id in running:
            del self._listeners[request_id]
        self.llm.abort_request(running)

    def _check(self) -> None:
        """Raise `ModelError` if a step has failed."""
        if self.error is not None:
            raise self.end_error()

    def end_error(self) -> ModelError:
        """Return an error that says why the engine has ended."""
        ended = ModelError(f"vLLM's engine has ended: {self.error}")
        ended.__cause__ = self.error
        return ended

    def _end(self, error: Exception) -> None:
        self.error = error
        listeners = set(self._listeners.values())
        self._listeners.clear()
        for listener in listeners:
            listener(self.end_error())

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
