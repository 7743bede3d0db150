"""vLLM's own OpenAI-compatible server on loopback, on top of the engine that the job uses.

Tools that use this protocol can query the model during training, even while the job generates: their requests join the
same batches. vLLM samples them, with the weights that are loaded at the moment.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from vllm import SamplingParams
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from nemo_rl.errors import ConfigError, WeightSyncError
from nemo_rl.models.generation.vllm.generator import VllmGenerator

_LOOPBACK = "127.0.0.1"
_START_TIMEOUT_S = 60.0


class HttpServer:
    """Serves one generator from its own threads until the process ends. Requests name the model as `spec.model_name`.

    Args:
        generator: The generator; its engine has a tokenizer.
        port: Port to listen on. 0: a free port.

    Raises:
        ConfigError: The port is taken, or the server did not start.
    """

    def __init__(self, generator: VllmGenerator, port: int) -> None:
        try:
            self._socket = socket.create_server((_LOOPBACK, port))
        except OSError as error:
            raise ConfigError(f"policy.generation.options.http_port: cannot listen on port {port}: {error}") from error
        self.url = f"http://{_LOOPBACK}:{self._socket.getsockname()[1]}/v1"
        self._client = _Client(generator)
        model_name = generator.spec.model_name
        self._arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(
            ["--model", model_name, "--served-model-name", model_name, "--disable-log-stats"]
        )
        self._started = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve()), name="http", daemon=True).start()
        if not self._started.wait(_START_TIMEOUT_S):
            raise ConfigError(f"the HTTP server of {generator.spec.name} did not start within {_START_TIMEOUT_S:.0f} s")

    async def _serve(self) -> None:
        tasks = await self._client.get_supported_tasks()
        app = build_app(self._arguments, tasks, self._client.model_config)
        await init_app_state(self._client, app.state, self._arguments, tasks)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self._started.set()
        await server.serve(sockets=[self._socket])


class _Client:
    """The part of `vllm.engine.protocol.EngineClient` that completions need."""

    is_running = True
    is_stopped = False
    errored = False

    def __init__(self, generator: VllmGenerator) -> None:
        self._generator = generator
        self._engine = generator.engine
        llm = self._engine.llm
        self.vllm_config = llm.vllm_config
        self.model_config = llm.model_config
        self.renderer = llm.renderer
        self.input_processor = llm.input_processor
        self._has_work = threading.Event()
        threading.Thread(target=self._step_forever, name="http steps", daemon=True).start()

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **unused: Any
    ) -> AsyncIterator[Any]:
        """Yield the outputs of one request as the engine returns them."""
        loop, outputs = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def enqueue(output: Any) -> None:
            loop.call_soon_threadsafe(outputs.put_nowait, output)

        def add() -> None:
            with self._engine.turn():
                self._generator.weights_version()
                self._engine.add(request_id, prompt, sampling_params, enqueue)
            self._has_work.set()

        def cancel() -> None:
            with self._engine.turn():
                self._engine.cancel([request_id])

        await asyncio.to_thread(add)
        try:
            finished = False
            while not finished:
                output = await outputs.get()
                finished = output.finished
                yield output
        finally:
            await asyncio.to_thread(cancel)

    def _step_forever(self) -> None:
        """Run steps while there are requests. A call of the job also runs steps; the two take turns."""
        while True:
            self._has_work.wait()
            with self._engine.turn():
                if self._engine.is_busy and self._generator.version is not None:
                    self._engine.step()
                else:
                    self._has_work.clear()

    async def get_supported_tasks(self) -> tuple[Any, ...]:
        tasks: tuple[Any, ...] = self._engine.llm.get_supported_tasks()
        return tasks

    async def check_health(self) -> None:
        self._generator.weights_version()

    async def is_tracing_enabled(self) -> bool:
        return False

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Accept every request: vLLM's queue has no limit here."""

    @property
    def dead_error(self) -> BaseException:
        return WeightSyncError(f"{self._generator.spec.name} has no weights")
