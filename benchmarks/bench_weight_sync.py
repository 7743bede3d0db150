"""Weights from a policy process to a generation process on one node: gigabytes per second, against copying memory.

    uv run benchmarks/bench_weight_sync.py                         # 0.1 B parameters in float32
    uv run benchmarks/bench_weight_sync.py --parameters 0.1 0.5 1.5 --dtype bfloat16

The tensors have the shapes of a Llama. `sync` is all of a sync, `publish` and `load` are its halves: the policy
publishes (one copy into the transport's memory, with the cast and the digest on the way), and the generator does one of
two things.

| case | what the generator does |
| --- | --- |
| in place (the torch backend) | maps what was published, multiplies with that, and computes the digest over it |
| own memory (vLLM) | copies it into memory of its own, and computes the digest over that |
| own memory, Ray | the same through Ray's object store, as between nodes |
| copy | one plain copy of as many bytes by one thread: the least that handing weights over can cost |

Each side computes with as many threads as the machine has cores, as the workers of a job do.
"""

from __future__ import annotations

import functools
import os
import time
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
CASES = [
    ("in place", "shared_memory", False),
    ("own memory", "shared_memory", True),
    ("own memory, Ray", "ray", True),
]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--parameters", nargs="+", type=float, choices=HIDDEN, default=[0.1], help="billions")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="that is published (the policy's: float32)")
    arguments = parser.parse_args()
    from nemo_rl.distributed.ray_session import start_local_ray

    start_local_ray(num_cpus=2)
    cases, ratios = [], []
    for billions in arguments.parameters:
        policy, generator = Sender.remote(billions), Receiver.remote()
        size = ray.get(policy.num_bytes.remote(arguments.dtype))
        name = f"{billions} B"
        for label, transport, copies in CASES:
            case = functools.partial(sync, policy, generator, arguments.dtype, size, transport, copies)
            cases.append(Case(f"{name}: {label}", case))
        cases.append(Case(f"{name}: copy", lambda g=generator, n=size: {"sync GB/s": ray.get(g.copy.remote(n))}))
        ratios += [
            Ratio("sync GB/s", f"{name}: {label}", f"{name}: copy", at_least=0.7 if transport != "ray" else None)
            for label, transport, _ in CASES
        ]
    results = harness.measure(cases, repeats=arguments.repeats, warmups=2)
    harness.report("weight_sync", results, ratios, arguments.json, title=f"gigabytes per second, {arguments.dtype}")


def sync(policy: Any, generator: Any, dtype: str, num_bytes: int, transport: str, copies: bool) -> Metrics:
    """One sync, as the driver of a job does it."""
    started = time.perf_counter()
    update = ray.get(policy.publish.remote(dtype, transport))
    published = time.perf_counter()
    ray.get(generator.load.remote(update, copies))
    ended = time.perf_counter()
    return {
        "sync GB/s": num_bytes / (ended - started) / GIGA,
        "publish GB/s": num_bytes / (published - started) / GIGA,
        "load GB/s": num_bytes / (ended - published) / GIGA,
    }


def llama_tensors(billions: float) -> list[tuple[str, torch.Tensor]]:
    """Float32 tensors with the names and shapes of a Llama of about that size."""
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
    """The policy's side."""

    def __init__(self, billions: float) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._tensors = llama_tensors(billions)
        self._version = 0
        self._senders: dict[str, Any] = {}

    def num_bytes(self, dtype: str) -> int:
        return sum(tensor.numel() for _, tensor in self._tensors) * getattr(torch, dtype).itemsize

    def publish(self, dtype: str, transport: str) -> Any:
        from nemo_rl.models.weights.sender import WeightSender

        self._version += 1
        sender = self._senders.setdefault(transport, WeightSender(transport))
        return sender.publish(self._tensors, version=self._version, dtype=dtype)


@ray.remote(num_cpus=0)
class Receiver:
    """The generator's side."""

    def __init__(self) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._own: dict[str, torch.Tensor] = {}
        self._views: dict[str, torch.Tensor] = {}

    def load(self, update: Any, copies: bool) -> str:
        from nemo_rl.models.weights.digest import check_digest, digest_tensors
        from nemo_rl.models.weights.receiver import receive

        weights = dict(receive(update, verify=False))
        if copies:
            for name, tensor in weights.items():
                if name not in self._own:
                    self._own[name] = torch.empty_like(tensor)
                self._own[name].copy_(tensor)
            weights = self._own
        else:
            self._views = weights
        digest = digest_tensors(weights.items())
        check_digest(version=update.version, expected=update.digest, found=digest, where="the receiver")
        return digest

    def copy(self, num_bytes: int) -> float:
        source, target = (np.zeros(num_bytes, np.uint8) for _ in range(2))
        np.copyto(target, source)
        return num_bytes / harness.timed(lambda: np.copyto(target, source)) / GIGA


if __name__ == "__main__":
    main()
