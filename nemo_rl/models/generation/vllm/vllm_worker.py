"""The worker of the vLLM backend. Runs in the VLLM venv, on nodes without GPUs in VLLM_CPU.

`make_generator` imports vLLM; this module does not, so that reading the class's description does not import vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray

from nemo_rl import settings
from nemo_rl.models.generation.generator import GeneratorSpec
from nemo_rl.models.generation.vllm.config import MAX_CONCURRENT_CALLS
from nemo_rl.models.generation.vllm.environment import export_vllm_variables
from nemo_rl.models.generation.worker import GenerationWorker
from nemo_rl.models.weights.interfaces import WeightStream, WeightUpdate

if TYPE_CHECKING:
    from nemo_rl.models.generation.interfaces import GenerationRequest, GenerationResult
    from nemo_rl.models.generation.vllm.executor import TiedGroup
    from nemo_rl.models.generation.vllm.generator import VllmGenerator
    from nemo_rl.models.generation.vllm.http_server import HttpServer


@ray.remote(concurrency_groups={"streams": MAX_CONCURRENT_CALLS, "in_flight": 1})  # type: ignore[call-overload]
class VllmGenerationWorker(GenerationWorker):
    """Completes prompts with a `VllmGenerator`, alone or together with the other workers of its tied group.

    Calls run one after the other, except `stream_concurrently` and `update_weights_in_flight`, which have threads of
    their own. These two are not for workers of tied groups.
    """

    def make_generator(self, spec: GeneratorSpec) -> VllmGenerator:
        export_vllm_variables()
        from nemo_rl.models.generation.vllm.generator import VllmGenerator

        generator = VllmGenerator(spec, _tied_group(spec.config.options.workers_per_replica))
        self._http = _serve_http(generator)
        return generator

    @ray.method(concurrency_group="streams")
    def stream_concurrently(self, request: GenerationRequest) -> Iterator[tuple[list[int], GenerationResult]]:
        """Complete prompts as `stream` does, while other calls run."""
        yield from self.generator.stream(request)

    @ray.method(concurrency_group="in_flight")
    def update_weights_in_flight(self, update: WeightUpdate | WeightStream) -> str:  # type: ignore[override]
        """Load weights between two steps of the running calls."""
        return self.generator.update_weights(update)

    def attestation(self) -> dict[str, Any]:
        http = {"http_url": None} if self._http is None else self._http.attestation()
        return {**super().attestation(), **http}

    def shutdown(self) -> None:
        if self._http is not None:
            self._http.token.discard()
        super().shutdown()


def _serve_http(generator: VllmGenerator) -> HttpServer | None:
    """Start the HTTP server if the options ask for one."""
    http_port = generator.options.http_port
    if http_port is None:
        return None
    from nemo_rl.models.generation.vllm.http_server import HttpServer

    return HttpServer(generator, http_port + settings.LOCAL_RANK.get() if http_port else 0)


def _tied_group(size: int) -> TiedGroup | None:
    """Return this worker's place among the `size` consecutive ranks that hold one model; None if it is alone."""
    if size == 1:
        return None
    from nemo_rl.models.generation.vllm.executor import TiedGroup

    rank = settings.RANK.get()
    leader = rank - rank % size
    variables = settings.snapshot()
    addresses, ports = (json.loads(variables[f"AVAILABLE_{kind}_LIST"]) for kind in ("ADDR", "PORT"))
    return TiedGroup(size, rank - leader, addresses[leader], ports[leader])
