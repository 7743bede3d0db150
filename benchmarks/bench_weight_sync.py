"""Measures the weight sync from a policy process to a generation process on one node, against copying memory.

    uv run benchmarks/bench_weight_sync.py                         # 0.1 B parameters in float32
    uv run benchmarks/bench_weight_sync.py --parameters 1.5 --dtype bfloat16 --cases streamed

Rates are in gigabytes per second. 1.5 B parameters take 20 GB in float32. For GPUs, use `bench_gpu.py --only weights`.

The tensors have the shapes of a Llama. The policy copies them into the transport's memory, and casts and digests them
on the way. The generator either uses that memory (in place: the torch backend) or copies it into its own memory (vLLM).
In both cases it computes the digest over the memory that it uses.

| case | method |
| --- | --- |
| streamed, in place / own memory | both sides at the same time, bucket by bucket: synchronous training on one node |
| streamed by gloo, own memory | the same over TCP (here on loopback), as between nodes |
| published, in place / own memory | first one side, then the other: asynchronous training |
| published, own memory, Ray | the same through Ray's object store, as between nodes |
| copy | one plain copy of the same number of bytes by one thread: the minimum cost of a transfer |

Each side uses as many threads as the machine has cores, like the workers of a job.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import harness
import numpy as np
import ray
import torch
from harness import Case, Metrics, Ratio

HIDDEN = {0.1: 768, 0.5: 1280, 1.5: 2048}
VOCABULARY = 32_000
DTYPES = ("float32", "bfloat16")
GIGA = 1e9
CASES = [  # name, transport, whether the receiver copies
    ("streamed, in place", "shared_memory", False),
    ("streamed, own memory", "shared_memory", True),
    ("streamed by gloo, own memory", "gloo", True),
    ("published, in place", "shared_memory", False),
    ("published, own memory", "shared_memory", True),
    ("published, own memory, Ray", "ray", True),
]
GOAL = {"streamed, in place": 0.7, "streamed, own memory": 0.7}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--parameters", nargs="+", type=float, choices=HIDDEN, default=[0.1], help="billions")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the sent weights (the policy's: float32)"
    )
    parser.add_argument("--cases", default="", help="only cases whose name starts with this: streamed, published")
    arguments = parser.parse_args()
    from nemo_rl.distributed.cluster.session import start_local_ray
    from nemo_rl.models.cpu_threads import cpu_env_vars

    start_local_ray(num_cpus=2)
    cases, ratios = [], []
    for billions in arguments.parameters:
        variables = {"runtime_env": {"env_vars": cpu_env_vars()}}  # the same as for the workers of a job
        policy, start_generator = Sender.options(**variables).remote(billions), Receiver.options(**variables).remote
        size = ray.get(policy.num_bytes.remote(arguments.dtype))
        name = f"{billions} B"
        chosen = [case for case in CASES if case[0].startswith(arguments.cases)]
        for label, transport, copies in chosen:
            transfer = functools.partial(stream if label.startswith("streamed") else publish, transport=transport)
            case = functools.partial(sync, transfer, policy, start_generator, arguments.dtype, size, copies)
            cases.append(Case(f"{name}: {label}", case))
        cases.append(Case(f"{name}: copy", functools.partial(copy, policy, start_generator, size)))
        ratios += [
            Ratio("sync GB/s", f"{name}: {label}", f"{name}: copy", at_least=GOAL.get(label)) for label, _, _ in chosen
        ]
    results = harness.measure(cases, repeats=arguments.repeats, warmups=1)
    harness.report("weight_sync", results, ratios, arguments.json, title=f"gigabytes per second, {arguments.dtype}")


def sync(transfer: Any, policy: Any, start_generator: Any, dtype: str, num_bytes: int, copies: bool) -> Metrics:
    """Measure one sync as in a job, after two uncounted syncs, because the in-place case uses two sets of memory."""
    with new_generator(policy, start_generator) as generator:
        for _ in range(2):
            transfer(policy, generator, dtype, copies)
        started = time.perf_counter()
        transfer(policy, generator, dtype, copies)
        return {"sync GB/s": num_bytes / (time.perf_counter() - started) / GIGA}


def copy(policy: Any, start_generator: Any, num_bytes: int) -> Metrics:
    with new_generator(policy, start_generator) as generator:
        return {"sync GB/s": ray.get(generator.copy.remote(num_bytes))}


@contextlib.contextmanager
def new_generator(policy: Any, start_generator: Any) -> Iterator[Any]:
    """Start a generator, and free the memory of the previous case, because several models would not fit."""
    ray.get(policy.release.remote())
    generator = start_generator()
    try:
        yield generator
    finally:
        ray.kill(generator)


def publish(policy: Any, generator: Any, dtype: str, copies: bool, *, transport: str) -> None:
    update = ray.get(policy.publish.remote(dtype, transport))
    ray.get(generator.load.remote(update, copies))


def stream(policy: Any, generator: Any, dtype: str, copies: bool, *, transport: str) -> None:
    begun = ray.get(policy.begin.remote(transport))
    sent = policy.send.remote(begun, dtype)
    ray.get([generator.load.remote(begun, copies), sent])


def llama_tensors(billions: float) -> list[tuple[str, torch.Tensor]]:
    """Return float32 tensors with the names and shapes of a Llama of about `billions` parameters."""
    hidden = HIDDEN[billions]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (4 * hidden, hidden),
        "mlp.up_proj": (4 * hidden, hidden),
        "mlp.down_proj": (hidden, 4 * hidden),
    }
    embedding = VOCABULARY * hidden
    layer = sum(rows * columns for rows, columns in shapes.values())
    num_layers = max(1, round((billions * 1e9 - embedding) / layer))
    tensors = [("model.embed_tokens.weight", torch.zeros(VOCABULARY, hidden).uniform_())]
    for index in range(num_layers):
        for name, shape in shapes.items():
            tensors.append((f"model.layers.{index}.{name}.weight", torch.zeros(shape).uniform_()))
    return tensors


@ray.remote(num_cpus=0)
class Sender:
    """Runs the policy's side."""

    def __init__(self, billions: float) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._tensors = llama_tensors(billions)
        self._version = 0
        self._sender: Any = None

    def release(self) -> None:
        self._sender = None

    def num_bytes(self, dtype: str) -> int:
        return sum(tensor.numel() for _, tensor in self._tensors) * getattr(torch, dtype).itemsize

    def begin(self, transport: str) -> Any:
        from nemo_rl.models.weights.interfaces import WeightStream
        from nemo_rl.models.weights.stream import WeightStreamer

        self._version += 1
        self._sender = self._sender or WeightStreamer(transport)
        address, key = self._sender.endpoint("127.0.0.1" if transport == "gloo" else None)
        return WeightStream(self._version, transport, address, key, self._version, 0)

    def send(self, begun: Any, dtype: str) -> None:
        self._sender.send(self._tensors, version=begun.version, dtype=dtype, stream=begun.stream, receivers=[0])

    def publish(self, dtype: str, transport: str) -> Any:
        from nemo_rl.models.weights.sender import WeightSender

        self._version += 1
        self._sender = self._sender or WeightSender(transport)
        return self._sender.publish(self._tensors, version=self._version, dtype=dtype)


@ray.remote(num_cpus=0)
class Receiver:
    """Runs the generator's side."""

    def __init__(self) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._weights: dict[str, torch.Tensor] = {}
        self._views: dict[str, torch.Tensor] = {}

    def load(self, update: Any, copies: bool) -> None:
        from nemo_rl.models.weights.digest import check_digest
        from nemo_rl.models.weights.receiver import receive

        if copies:
            digest, expected = self._copied(update)
        else:
            weights = receive(update, verify=False, keeps=True)
            self._views = dict(weights)
            digest, expected = weights.digest_of(self._views.items()), weights.digest
        check_digest(version=update.version, expected=expected, found=digest, where="the receiver")

    def _copied(self, update: Any) -> tuple[str, str]:
        """Copy the weights like vLLM's worker: each bucket is read back after it is loaded."""
        from nemo_rl.models.weights.digest import WeightDigest
        from nemo_rl.models.weights.receiver import receive

        digest = WeightDigest()

        def read(specs: Any) -> None:
            for spec in specs:
                digest.add_tensor(spec.name, self._weights[spec.name])

        weights = receive(update, verify=False, on_loaded=read)
        for name, tensor in weights:
            if name not in self._weights:
                self._weights[name] = torch.empty_like(tensor)
            self._weights[name].copy_(tensor)
        return digest.hexdigest(), weights.digest

    def copy(self, num_bytes: int) -> float:
        source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
        np.copyto(target, source)
        seconds = [harness.timed(lambda: np.copyto(target, source)) for _ in range(5)]
        return num_bytes / statistics.median(seconds) / GIGA


if __name__ == "__main__":
    main()
