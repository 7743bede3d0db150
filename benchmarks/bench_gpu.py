"""Training, generation and weights on one CUDA device, in this process and without Ray.

    python benchmarks/bench_gpu.py                            # everything that this Python has packages for
    python benchmarks/bench_gpu.py --only train --sizes 0.5B 1.5B
    python benchmarks/bench_gpu.py --device cpu --tiny        # no measurement: shows that all of it runs

| topic | measures | against |
| --- | --- | --- |
| `train` | an optimizer step of the torch policy, and of Megatron's where `megatron.core` is there, in bfloat16 | the chip's own rate of one large bfloat16 matrix product: the ratio is the model FLOPs utilisation (MFU) |
| `offload` | weights and optimizer state to the host and back | a plain copy between pinned memory and the device |
| `generate` | tokens per second of the torch engine, and of vLLM where it is there | |
| `weights` | weights to another process on the same GPU, by CUDA IPC | a copy on the device |
| `grpo` | whole GRPO steps: sync, rollout, rewards, log-probabilities, training; seconds per phase | |

FLOPs of a step are 6 per token and weight of a matrix (2 forward, 4 backward), and 6 T h per token and layer for causal
attention over T tokens with h channels: Chowdhery et al. 2022, "PaLM", appendix B, which counts 12 for attention without
a mask. The embedding is a look-up and does not count, the output matrix does where the loss counts a token, and what is
recomputed counts once.
"""  # noqa: E501 - a table

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from harness import Measurements, Ratio


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        device: "cuda" or "cpu".
        sizes: names in `one_process.SIZES`.
        num_tokens: of one sequence.
        batch: sequences of one optimizer step.
        micro_batch: sequences of one forward pass.
        matmul: rows and columns of the large matrices.
    """

    device: str
    sizes: tuple[str, ...]
    repeats: int
    num_tokens: int = 2048
    batch: int = 16
    micro_batch: int = 4
    matmul: int = 8192

    @property
    def precision(self) -> str:
        return "bfloat16"


Topic = Callable[[Plan, Path], tuple[Measurements, list[Ratio], list[str]]]


def main() -> None:
    import gpu_topics

    topics: dict[str, Topic] = gpu_topics.TOPICS
    parser = harness.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=topics, default=list(topics), metavar="TOPIC")
    parser.add_argument("--sizes", nargs="+", default=["0.1B", "0.5B", "1.5B"], choices=["0.1B", "0.5B", "1.5B"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest model and matrices there are")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; --device cpu --tiny shows that the benchmark runs")
    results, ratios, notes = Measurements(), [], []
    for topic in arguments.only:
        with tempfile.TemporaryDirectory() as directory:
            found, compared, said = topics[topic](_plan(arguments), Path(directory))
        gpu_topics.let_memory_go()
        results.merge(found)
        ratios += compared
        notes += said
    if arguments.device == "cpu":
        notes.append("on a CPU: a trial of the benchmark, not a measurement")
    details = {"device": _device_name(arguments.device), "megatron": _has("megatron.core"), "vllm": _has("vllm")}
    harness.report("gpu", results, ratios, arguments.json, title=details["device"], notes=notes, details=details)


def _plan(arguments: argparse.Namespace) -> Plan:
    if arguments.tiny:
        return Plan(arguments.device, ("tiny",), arguments.repeats, num_tokens=32, batch=4, micro_batch=2, matmul=128)
    return Plan(arguments.device, tuple(arguments.sizes), arguments.repeats)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _has(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    main()
