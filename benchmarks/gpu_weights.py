"""Implements the topic `weights` of `bench_gpu.py`: one process sends weights to another one on the same GPU."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import harness
import torch
from gpu_plan import Plan
from harness import Case, Measurements, Metrics, Ratio
from one_process import SIZES, write_llama

from nemo_rl.models.weights.digest import check_digest
from nemo_rl.models.weights.interfaces import WeightStream
from nemo_rl.models.weights.receiver import receive
from nemo_rl.models.weights.stream import WeightStreamer

GIGA = 1e9
COPY = "copy on the device"
TRANSPORTS = {"cuda": "cuda_ipc", "cpu": "shared_memory"}


def measure_weights(plan: Plan, directory: Path) -> tuple[Measurements, list[Ratio], list[str]]:
    """Measure gather, cast, digest, load and read back, against one copy of the same number of bytes."""
    from transformers import AutoModelForCausalLM

    size = plan.sizes[-1]
    write_llama(directory, SIZES[size], plan.num_tokens, device=plan.device)
    model = AutoModelForCausalLM.from_pretrained(directory).to(plan.device)
    num_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    with _Generator.started(plan.device) as generator:
        name = f"weights by {TRANSPORTS[plan.device]} {size}"
        cases = [
            Case(name, partial(_sync, model, generator, num_bytes)),
            Case(COPY, partial(_copy, plan, num_bytes)),
        ]
        results = harness.measure(cases, plan.repeats, warmups=2)
    return results, [Ratio("sync GB/s", name, COPY)], []


@dataclass
class _Generator:
    """Manages the generator process, and the policy's end of the transport."""

    process: Any
    pipe: Connection
    transport: str
    streamer: WeightStreamer
    num_streams: int = 0

    @classmethod
    def started(cls, device: str) -> Any:
        context = multiprocessing.get_context("spawn")
        parent, child = context.Pipe()
        process = context.Process(target=_load_all, args=(child, device), daemon=True)
        process.start()
        transport = TRANSPORTS[device]
        return cls(process, parent, transport, WeightStreamer(transport))

    def __enter__(self) -> _Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.send(None)
        self.process.join(30)
        self.process.kill()


def _sync(model: Any, generator: _Generator, num_bytes: int) -> Metrics:
    """Measure one update, from gathering the first tensor to comparing the digests."""
    generator.num_streams += 1
    number = generator.num_streams
    address, key = generator.streamer.endpoint()
    stream = WeightStream(number, generator.transport, address, key, number, 0)

    def transfer() -> None:
        with ThreadPoolExecutor(1) as threads:
            generator.pipe.send(stream)
            sent = threads.submit(
                generator.streamer.send,
                model.named_parameters(),
                version=number,
                dtype="bfloat16",
                stream=number,
                receivers=[0],
            )
            while not generator.pipe.poll(1):
                if not generator.process.is_alive():
                    raise SystemExit("the generator process exited; see its error above")
            digest = generator.pipe.recv()
            check_digest(version=number, expected=sent.result(), found=digest, where="the generator process")

    return {"sync GB/s": num_bytes / harness.timed(transfer) / GIGA}


def _copy(plan: Plan, num_bytes: int) -> Metrics:
    source = torch.ones(num_bytes, dtype=torch.uint8, device=plan.device)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)
        if plan.device == "cuda":
            torch.cuda.synchronize()

    copy()
    return {"sync GB/s": num_bytes / harness.timed(copy) / GIGA}


def _load_all(pipe: Connection, device: str) -> None:
    """Run the generator process: load every stream into separate tensors and return their digest."""
    loaded: dict[str, torch.Tensor] = {}
    streams: Iterator[WeightStream] = iter(pipe.recv, None)
    for stream in streams:
        weights = receive(stream, device=device, verify=False)
        for name, tensor in weights:
            if name not in loaded:
                loaded[name] = torch.empty_like(tensor)
            loaded[name].copy_(tensor)
        pipe.send(weights.digest_of(loaded.items()))
