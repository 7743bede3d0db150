"""One generation worker: a `VllmGenerator` in a Ray actor. Runs in the VLLM venv, on nodes without GPUs in VLLM_CPU.

vLLM is imported by the constructor and not by this module, so that describing the class costs no import of vLLM.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray
import torch

from nemo_rl import settings
from nemo_rl.models.generation.config import GenerationConfig, SamplingConfig
from nemo_rl.models.generation.interfaces import GenerationResult
from nemo_rl.models.generation.vllm.config import VllmOptions
from nemo_rl.models.generation.vllm.environment import export_vllm_variables
from nemo_rl.models.generation.worker_base import GeneratorWorker
from nemo_rl.models.weights.interfaces import WeightStream, WeightUpdate
from nemo_rl.models.worker_process import starts_without_collecting, take_cpu_share

if TYPE_CHECKING:
    from nemo_rl.models.generation.vllm.executor import TiedGroup
    from nemo_rl.models.generation.vllm.generator import VllmGenerator


@ray.remote(concurrency_groups={"in_flight": 1})  # type: ignore[call-overload]
class VllmGenerationWorker(GeneratorWorker["VllmGenerator"]):
    """Completes its share of every call's prompts, alone or together with the other workers of its tied group.

    Calls are worked off one after the other, but for `update_weights_in_flight`, which has a thread of its own.

    Args:
        model_name: Hugging Face directory or hub name.
        config: how to sample and when to stop; its options are `VllmOptions`.
        max_sequence_length: longest prompt plus completion, in tokens.
        tokenizer_name: None: the model's own.
        precision: "float32" or "bfloat16"; `config.precision` wins.
        use_gpu: compute on the GPU that this worker was given.
        num_local_workers: workers on this node, which share its CPUs.
    """

    @starts_without_collecting
    def __init__(
        self,
        model_name: str,
        config: GenerationConfig,
        *,
        max_sequence_length: int,
        tokenizer_name: str | None = None,
        precision: str = "float32",
        use_gpu: bool = False,
        num_local_workers: int = 1,
    ) -> None:
        if not use_gpu:
            take_cpu_share(config.num_threads, num_local_workers)
        export_vllm_variables()
        from nemo_rl.models.generation.vllm.generator import VllmGenerator

        tied_group = _tied_group(config.options.workers_per_replica)
        self._is_leader = tied_group is None or tied_group.rank == 0
        self._generator = VllmGenerator(
            model_name,
            config,
            max_sequence_length=max_sequence_length,
            tokenizer_name=tokenizer_name,
            precision=precision,
            use_gpu=use_gpu,
            tied_group=tied_group,
            name=f"generation worker {settings.RANK.get()} on {socket.gethostname()}",
        )
        self._http_url = _serve_http(self._generator, model_name)

    @ray.method(concurrency_group="in_flight")
    def update_weights_in_flight(self, update: WeightUpdate | WeightStream) -> str:  # type: ignore[override]
        """`update_weights` between two steps of the call that is under way. Not for workers of tied groups."""
        return self._generator.update_weights(update)

    def stream(
        self,
        prompts: dict[str, torch.Tensor],
        *,
        seed: int,
        num_generations: int,
        greedy: bool,
        sampling: SamplingConfig | None,
        first_prompt: int,
    ) -> Iterator[tuple[list[int], GenerationResult]]:
        """`generate`, in pieces: prompts whose completions have all ended, while others are still being completed."""
        pieces = self._generator.stream(
            prompts["input_ids"],
            prompts["input_lengths"],
            seed=seed,
            num_generations=num_generations,
            greedy=greedy,
            sampling=sampling,
            first_prompt=first_prompt,
        )
        for piece in pieces:
            if self._is_leader:
                yield piece

    def sleep(self, level: int = 1) -> None:
        """Give a GPU's memory back until `wake`. See `VllmGenerator.sleep`."""
        self._generator.sleep(level)

    def wake(self, tags: list[str] | None = None) -> None:
        """Take the memory again. See `VllmGenerator.wake`."""
        self._generator.wake(tags)

    def attestation(self) -> dict[str, Any]:
        """What this worker runs on and with."""
        return {**super().attestation(), "http_url": self._http_url}

    def shutdown(self) -> None:
        """Stop the engine; the worker cannot be used afterwards."""
        self._generator.shutdown()


def _serve_http(generator: VllmGenerator, model_name: str) -> str | None:
    """Start the HTTP server where one is asked for; returns its address."""
    options = generator.config.options
    assert isinstance(options, VllmOptions)
    if options.http_port is None:
        return None
    from nemo_rl.models.generation.vllm.http_server import HttpServer

    port = options.http_port + settings.LOCAL_RANK.get() if options.http_port else 0
    return HttpServer(generator, model_name, port).url


def _tied_group(size: int) -> TiedGroup | None:
    """This worker's place among the `size` consecutive ranks that hold one model together; None when it is alone."""
    if size == 1:
        return None
    from nemo_rl.models.generation.vllm.executor import TiedGroup

    rank = settings.RANK.get()
    leader = rank - rank % size
    variables = settings.snapshot()
    addresses, ports = (json.loads(variables[f"AVAILABLE_{kind}_LIST"]) for kind in ("ADDR", "PORT"))
    return TiedGroup(size, rank - leader, addresses[leader], ports[leader])
