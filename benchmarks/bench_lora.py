"""Compares LoRA with full training: memory of a policy worker, bytes and time of a weight sync to generation.

    uv run benchmarks/bench_lora.py                           # the embedded model, and one with 25 M parameters
    uv run benchmarks/bench_lora.py --rank 8 --repeats 1

| case | what is trained | what a sync sends |
| --- | --- | --- |
| full | all weights | all weights |
| LoRA, merged | adapters of all linear layers | all weights, merged by the policy |
| LoRA | the same | the adapters; the base weights once, before the first step |

Each case runs in a process of its own: a policy worker takes two optimizer steps on random tokens, then a generator of
the torch backend loads its weights through shared memory, in float32. Sizes are exact, in 10^6 bytes: of weights,
gradients and AdamW's state (`training MB` is their sum; activations are the same in all cases), and of what is sent at
each sync, and once. `sync CPU ms` is the CPU time of both sides to publish, load and verify a version, with one thread,
after two uncounted syncs.
"""

from __future__ import annotations

import functools
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Case, Metrics, Ratio

MODELS: dict[str, dict[str, Any]] = {
    "embedded": {},
    "25 M": {"hidden_size": 512, "num_layers": 8, "num_attention_heads": 8},
}
MODES = ("full", "LoRA, merged", "LoRA")
MEGA = 1e6
ROWS, TOKENS = 16, 64


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cases, ratios = [], []
        for model, sizes in MODELS.items():
            directory = Path(scratch) / model
            write_model(directory, sizes)
            for mode in MODES:
                run = functools.partial(in_new_process, str(directory), mode, arguments.rank)
                cases.append(Case(f"{model}: {mode}", run))
            for metric in ("training MB", "sync MB", "sync CPU ms"):
                ratios.append(Ratio(metric, f"{model}: LoRA", f"{model}: full"))
            ratios.append(Ratio("sync CPU ms", f"{model}: LoRA", f"{model}: LoRA, merged"))
        results = harness.measure(cases, repeats=arguments.repeats)
    harness.report("lora", results, ratios, arguments.json, title=f"LoRA of rank {arguments.rank} and full training")


def write_model(directory: Path, sizes: dict[str, Any]) -> None:
    """Write an untrained model of the embedded architecture, with a tokenizer."""
    from nemo_rl.models.embedded import make_tokenizer
    from nemo_rl.models.embedded.recipe import make_model
    from nemo_rl.models.policy.config import EmbeddedModelConfig

    tokenizer = make_tokenizer()
    make_model(EmbeddedModelConfig(**sizes), tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def in_new_process(directory: str, mode: str, rank: int) -> Metrics:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, directory, mode, rank).result()


def measure(directory: str, mode: str, rank: int) -> Metrics:
    """Train and sync in this process."""
    from nemo_rl.models.generation.config import GenerationConfig
    from nemo_rl.models.generation.generator import GeneratorSpec
    from nemo_rl.models.generation.torch.generator import TorchGenerator
    from nemo_rl.models.policy.config import LoraConfig, PolicyConfig
    from nemo_rl.models.policy.torch_policy_worker import TorchPolicyWorker

    lora = None if mode == "full" else LoraConfig(rank=rank, alpha=2 * rank)
    config = PolicyConfig(model_name=directory, num_threads=1, max_sequence_length=TOKENS, lora=lora)
    worker = TorchPolicyWorker(config, total_steps=3, seed=0, device_type="cpu", weight_transport="shared_memory")
    for seed in range(2):
        worker.train(random_batch(seed), advantage_loss)
    parameters = list(worker._model.parameters().values())
    gradients = sum(size(parameter) for parameter in parameters if parameter.requires_grad)
    state = sum(size(tensor) for tensor in worker._optimizer.state_tensors())
    weights = sum(map(size, parameters))

    generator = TorchGenerator(GeneratorSpec(directory, GenerationConfig(num_threads=1), TOKENS))
    publish = worker.publish_adapters if mode == "LoRA" else worker.publish_weights
    update: Any = None

    def sync(version: int) -> None:
        nonlocal update
        update = publish(version, "float32")
        generator.update_weights(update)

    for version in range(2):
        sync(version)
    seconds = []
    for version in range(2, 9):
        started = time.process_time()
        sync(version)
        seconds.append(time.process_time() - started)
    base = 0 if update.base is None else sum(bucket.num_bytes for bucket in update.base.buckets)
    return {
        "weights MB": weights / MEGA,
        "gradients MB": gradients / MEGA,
        "optimizer MB": state / MEGA,
        "training MB": (weights + gradients + state) / MEGA,
        "sync MB": sum(bucket.num_bytes for bucket in update.buckets) / MEGA,
        "once MB": base / MEGA,
        "sync CPU ms": 1e3 * statistics.median(seconds),
    }


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def random_batch(seed: int) -> Any:
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    draws = torch.Generator().manual_seed(seed)
    return BatchedDataDict(
        input_ids=torch.randint(3, 20, (ROWS, TOKENS), generator=draws),
        input_lengths=torch.full((ROWS,), TOKENS),
        token_mask=torch.ones(ROWS, TOKENS),
        sample_mask=torch.ones(ROWS),
        advantages=torch.randn(ROWS, generator=draws),
    )


def advantage_loss(logprobs: torch.Tensor, batch: Any, num_tokens: torch.Tensor, num_samples: torch.Tensor) -> Any:
    return -(logprobs[:, 1:] * batch["advantages"][:, None]).sum() / num_tokens, {}


if __name__ == "__main__":
    main()
