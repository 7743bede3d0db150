"""Measures training, generation and weight transfer on one CUDA device, in this process and without Ray.

    python benchmarks/bench_gpu.py                            # all topics for which packages are installed
    python benchmarks/bench_gpu.py --only train --sizes 0.5B 1.5B
    python benchmarks/bench_gpu.py --device cpu --tiny        # not a measurement: shows that every topic runs

| topic | measures | against |
| --- | --- | --- |
| `train` | an optimizer step in bfloat16, of the torch policy and, if `megatron.core` is installed, of the Megatron policy | the chip's rate for one large bfloat16 matrix product: the ratio is the model FLOPs utilisation (MFU) |
| `offload` | weights and optimizer state to the host and back | a plain copy between pinned memory and the device |
| `generate` | tokens per second of the torch engine and, if it is installed, of vLLM | |
| `weights` | weights to another process on the same GPU, by CUDA IPC | a copy on the device |
| `grpo` | complete GRPO steps: sync, rollout, rewards, log-probabilities, training; seconds per phase | |

The FLOPs of a step are 6 per token and matrix weight (2 forward, 4 backward), plus 6 T h per token and layer for causal
attention over T tokens with h channels. Source: Chowdhery et al. 2022, "PaLM", appendix B, which counts 12 for
attention without a mask. The embedding is a look-up and is not counted. The output matrix is counted for tokens in the
loss. Recomputation is not counted.
"""  # noqa: E501 - a table

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import harness
import torch
from gpu_plan import Plan
from harness import Measurements, Ratio

Topic = Callable[[Plan, Path], tuple[Measurements, list[Ratio], list[str]]]


def main() -> None:
    import gpu_topics

    topics: dict[str, Topic] = gpu_topics.TOPICS
    parser = harness.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=topics, default=list(topics), metavar="TOPIC")
    parser.add_argument("--sizes", nargs="+", default=["0.1B", "0.5B", "1.5B"], choices=["0.1B", "0.5B", "1.5B"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="use the smallest model and matrices")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device. --device cpu --tiny shows that the benchmark runs.")
    results, ratios, notes = Measurements(), [], []
    for topic in arguments.only:
        with tempfile.TemporaryDirectory() as directory:
            topic_results, topic_ratios, topic_notes = topics[topic](_plan(arguments), Path(directory))
        gpu_topics.release_memory()
        results.merge(topic_results)
        ratios += topic_ratios
        notes += topic_notes
    if arguments.device == "cpu":
        notes.append("on a CPU: a test of the benchmark, not a measurement")
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
