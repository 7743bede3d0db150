"""vLLM's own OpenAI-compatible server on loopback, on top of the engine that the job uses.

Tools that use this protocol can query the model during training, even while the job generates: their requests join the
same batches. vLLM samples them, with the weights that are loaded at the moment. A request that arrives, or is running,
while the engine sleeps or has no weights waits until both have ended.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

import uvicorn
from vllm import SamplingParams
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from nemo_rl.distributed.cluster import ports
from nemo_rl.errors import ConfigError
from nemo_rl.models.generation.vllm.access import AccessToken, TokenRequired
from nemo_rl.models.generation.vllm.generator import VllmGenerator

logger = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"
_START_TIMEOUT_S = 60.0


class HttpServer:
    """Serves one generator from its own threads until the process ends. Requests name the model as `spec.model_name`.

    Every request must carry the token (`Authorization: Bearer ...`), whatever its path.

    Args:
        generator: The generator; its engine has a tokenizer.
        port: Port to listen on. 0: a free port.

    Attributes:
        url: Address of the API.
        token: The token, and the file that holds it.

    Raises:
        ConfigError: The port is taken, or the server did not start.
    """

    def __init__(self, generator: VllmGenerator, port: int) -> None:
        try:
            self._socket = socket.create_server((_LOOPBACK, port)) if port else ports.listen(_LOOPBACK)
        except OSError as error:
            raise ConfigError(f"policy.generation.options.http_port: cannot listen on port {port}: {error}") from error
        port = self._socket.getsockname()[1]
        self.url = f"http://{_LOOPBACK}:{port}/v1"
        self.token = AccessToken.for_port(port)
        self._client = _Client(generator)
        model_name = generator.spec.model_name
        self._arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(
            ["--model", model_name, "--served-model-name", model_name, "--disable-log-stats"]
        )
        self._started: Future[None] = Future()
        threading.Thread(target=self._run, name="http", daemon=True).start()
        try:
            self._started.result(_START_TIMEOUT_S)
        except Exception as error:
            self.token.discard()
            raise ConfigError(
                f"the HTTP server of {generator.spec.name} did not start within {_START_TIMEOUT_S:.0f} s: {error!r}"
            ) from error

    def attestation(self) -> dict[str, Any]:
        """Return where the server listens, and where its token is. The token itself is in no record."""
        file = self.token.file
        return {"http_url": self.url, "http_token_file": None if file is None else str(file)}

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:
            if self._started.done():
                logger.exception("the HTTP server at %s has ended", self.url)
            else:
                self._started.set_exception(error)

    async def _serve(self) -> None:
        tasks = await self._client.get_supported_tasks()
        app = build_app(self._arguments, tasks, self._client.model_config)
        await init_app_state(self._client, app.state, self._arguments, tasks)
        guarded = TokenRequired(app, self.token.value)
        server = uvicorn.Server(uvicorn.Config(guarded, log_level="warning"))
        self._started.set_result(None)
        await server.serve(sockets=[self._socket])


class _Client:
    """The part of `vllm.engine.protocol.EngineClient` that completions need."""

    is_running = True
    is_stopped = False

    def __init__(self, generator: VllmGenerator) -> None:
        self._generator = generator
        self._engine = generator.engine
        llm = self._engine.llm
        self.vllm_config = llm.vllm_config
        self.model_config = llm.model_config
        self.renderer = llm.renderer
        self.input_processor = llm.input_processor

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **unused: Any
    ) -> AsyncIterator[Any]:
        """Yield the outputs of one request as the engine returns them. The client's `request_id` is not used."""
        loop, steps = asyncio.get_running_loop(), asyncio.Queue[list[Any] | Exception]()
        added: list[str] = []
        is_cancelled = False

        def enqueue(outputs: list[Any] | Exception) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, outputs)

        def add() -> None:
            with self._engine.turn():
                if not is_cancelled:
                    added.append(self._engine.add(prompt, sampling_params, enqueue))

        def cancel() -> None:
            nonlocal is_cancelled
            with self._engine.turn():
                is_cancelled = True  # the client may disconnect before `add` has its turn
                self._engine.cancel(added)

        try:
            await asyncio.to_thread(add)
            finished = False
            while not finished:
                outputs = await steps.get()
                if isinstance(outputs, Exception):
                    raise outputs
                for output in outputs:
                    finished = output.finished
                    yield output
        finally:
            await asyncio.to_thread(cancel)

    async def get_supported_tasks(self) -> tuple[Any, ...]:
        tasks: tuple[Any, ...] = self._engine.llm.get_supported_tasks()
        return tasks

    async def check_health(self) -> None:
        if self.errored:
            raise self.dead_error
        self._generator.weights_version()

    @property
    def errored(self) -> bool:
        return self._engine.error is not None

    @property
    def dead_error(self) -> BaseException:
        return self._engine.end_error()

    async def is_tracing_enabled(self) -> bool:
        return False

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Accept every request: vLLM's queue has no limit here."""
