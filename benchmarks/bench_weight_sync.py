"""Measures the weight sync from a policy process to a generation process on one node, against two bare processes.

    uv run benchmarks/bench_weight_sync.py                         # 0.1 B parameters in float32
    uv run benchmarks/bench_weight_sync.py --parameters 1.5 --dtype bfloat16 --cases streamed

Rates are in gigabytes per second. 1.5 B parameters take 20 GB in float32. For GPUs, use `bench_gpu.py --only weights`.

The tensors have the shapes of a Llama. The policy copies them into the transport's memory, and casts and digests them
on the way. The generator either uses that memory (in place: the torch backend) or copies it into its own memory (vLLM).
In both cases it computes the digest over the memory that it uses. Rates are medians of 5 syncs, after two.

| case | method |
| --- | --- |
| streamed, in place / own memory | both sides at the same time, bucket by bucket: synchronous training on one node |
| streamed by gloo, own memory | the same over TCP (here on loopback), as between nodes |
| published, in place / own memory | first one side, then the other: asynchronous training |
| published, own memory, Ray | the same through Ray's object store, as between nodes |
| copy | one plain copy of the same number of bytes by one thread |

Between the streamed syncs, two bare processes exchange and digest as many bytes in pieces of shared memory, without our
code: `baselines/bare_exchange.py`, the metric `bare processes GB/s`. This is the least that a sync of this kind takes.

Each side uses as many threads as the machine has cores, like the workers of a job.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
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
GOAL = {"streamed, in place": 0.9, "streamed, own memory": 0.9}
BARE = "bare processes GB/s"
BARE_EXCHANGE = Path(__file__).parent / "baselines" / "bare_exchange.py"
NUM_SYNCS = 5

endpoints: dict[str, Any] = {}  # of this case, by transport
numbers = itertools.count(1)  # of the streams


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
            case = functools.partial(
                sync, transfer, policy, start_generator, arguments.dtype, size, copies, label in GOAL
            )
            cases.append(Case(f"{name}: {label}", case))
        cases.append(Case(f"{name}: copy", functools.partial(copy, policy, start_generator, size)))
        for label, _, _ in chosen:
            if label in GOAL:
                case = f"{name}: {label}"
                ratios.append(Ratio("sync GB/s", case, case, at_least=GOAL[label], baseline_metric=BARE))
                ratios.append(Ratio(BARE, case, f"{name}: copy", baseline_metric="sync GB/s"))
            ratios.append(Ratio("sync GB/s", f"{name}: {label}", f"{name}: copy"))
    results = harness.measure(cases, repeats=arguments.repeats, warmups=1)
    harness.report("weight_sync", results, ratios, arguments.json, title=f"gigabytes per second, {arguments.dtype}")


def sync(
    transfer: Any, policy: Any, start_generator: Any, dtype: str, num_bytes: int, copies: bool, compares: bool
) -> Metrics:
    """Measure syncs as in a job, and after each the exchange between two bare processes, if `compares`.

    There are two uncounted ones of both before, because the in-place case uses two sets of memory.
    """
    ours, bare = [], []
    with contextlib.ExitStack() as stack:
        generator = stack.enter_context(new_generator(policy, start_generator))
        exchange = stack.enter_context(bare_processes(num_bytes, copies)) if compares else None
        for _ in range(2 + NUM_SYNCS):
            ours.append(harness.timed(lambda: transfer(policy, generator, dtype, copies)))
            if exchange is not None:
                bare.append(exchange())
    rates = {"sync GB/s": num_bytes / statistics.median(ours[2:]) / GIGA}
    return rates | ({BARE: num_bytes / statistics.median(bare[2:]) / GIGA} if compares else {})


@contextlib.contextmanager
def bare_processes(num_bytes: int, copies: bool) -> Iterator[Callable[[], float]]:
    """Yield a function that lets two bare processes exchange bytes once, and returns the seconds."""
    command = [sys.executable, str(BARE_EXCHANGE), json.dumps({"num_bytes": num_bytes, "copies": copies})]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        requests, answers = child.stdin, child.stdout
        assert requests is not None
        assert answers is not None

        def exchange() -> float:
            print(file=requests, flush=True)
            return float(json.loads(answers.readline())["seconds"])

        yield exchange
        requests.close()


def copy(policy: Any, start_generator: Any, num_bytes: int) -> Metrics:
    with new_generator(policy, start_generator) as generator:
        return {"sync GB/s": ray.get(generator.copy.remote(num_bytes))}


@contextlib.contextmanager
def new_generator(policy: Any, start_generator: Any) -> Iterator[Any]:
    """Start a generator, and free the memory of the previous case, because several models would not fit."""
    endpoints.clear()
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
    from nemo_rl.models.weights.interfaces import WeightStream

    if transport not in endpoints:  # as in a job, the policy is asked once
        endpoints[transport] = ray.get(policy.endpoint.remote(transport))
    address, key = endpoints[transport]
    number = next(numbers)
    begun = WeightStream(number, transport, address, key, number, 0)
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

    def endpoint(self, transport: str) -> Any:
        from nemo_rl.models.weights.stream import WeightStreamer

        self._sender = WeightStreamer(transport)
        return self._sender.endpoint("127.0.0.1" if transport == "gloo" else None)

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

    def load(self, update: Any, copies: bool) -> None:
        from nemo_rl.models.weights.digest import check_digest
        from nemo_rl.models.weights.receiver import receive

        weights = receive(update, verify=False, keeps=not copies, into=self._weights if copies else None)
        if copies:
            self._copy(weights)
        else:
            self._weights = dict(weights)
        digest = weights.digest_of(self._weights.items())
        check_digest(version=update.version, expected=weights.digest, found=digest, where="the receiver")

    def _copy(self, weights: Any) -> None:
        """Load what has not been written into this process's memory as it arrived."""
        for name, tensor in weights:
            own = self._weights.setdefault(name, torch.empty_like(tensor))
            if own is not tensor:
                own.copy_(tensor)

    def copy(self, num_bytes: int) -> float:
        source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
        np.copyto(target, source)
        seconds = [harness.timed(lambda: np.copyto(target, source)) for _ in range(5)]
        return num_bytes / statistics.median(seconds) / GIGA


if __name__ == "__main__":
    main()
