"""Implements the topics of `bench_gpu.py`, whose docstring explains how FLOPs are counted."""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gpu_weights
import harness
import torch
from gpu_plan import Plan
from harness import Case, Measurements, Metrics, Ratio
from one_process import SIZES, ModelSize, OneWorkerPolicy, make_job, write_llama

from nemo_rl.algorithms.config import LossConfig, MasterConfig
from nemo_rl.algorithms.loss_functions import ClippedPGLoss
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.embedded import make_tokenizer
from nemo_rl.models.generation.config import GenerationConfig
from nemo_rl.models.generation.generator import GeneratorSpec
from nemo_rl.models.generation.interfaces import GenerationRequest
from nemo_rl.models.generation.torch.generator import TorchGenerator
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.offload import Part
from nemo_rl.models.weights.sender import publish

GIGA, TERA = 1e9, 1e12
MATMUL = "matrix product"
COPY = "copy, pinned memory"
_PRODUCTS = 20
TopicResult = tuple[Measurements, list[Ratio], list[str]]


def train(plan: Plan, directory: Path) -> TopicResult:
    """Measure optimizer steps in tokens per second, and as a share of the chip's matrix product rate.

    Only one worker exists at a time, interleaved with matrix products, so workers do not share memory. megatron-core
    also supports only one process group per process.
    """
    results, ratios, notes = Measurements(), [], []
    backends = ["torch"]
    if importlib.util.find_spec("megatron") is not None:
        backends.append("megatron")
    else:
        notes.append("train: megatron.core is not installed here; skipped")
    for size in plan.sizes:
        model = directory / size
        write_llama(model, SIZES[size], plan.num_tokens, device=plan.device)
        for backend in backends:
            name = f"train {backend} {size}"
            baseline = f"{MATMUL}, beside {name}"
            with _worker(backend, plan, model) as worker:
                step = partial(_train_step, worker, plan, SIZES[size])
                cases = [Case(baseline, partial(_matmul, plan)), Case(name, step)]
                results.merge(harness.measure(cases, plan.repeats, warmups=2))
            del worker, step, cases
            release_memory()
            ratios.append(Ratio("TFLOP/s", name, baseline))
    return results, ratios, notes


def offload(plan: Plan, directory: Path) -> TopicResult:
    """Measure the cost of `policy.offload` per step: the same bytes to the host and back."""
    size = plan.sizes[-1]
    write_llama(directory, SIZES[size], plan.num_tokens, device=plan.device)
    with _worker("torch", plan, directory) as worker:
        _train_step(worker, plan, SIZES[size])  # creates the optimizer state
        cases = [
            Case(f"offload {size}", partial(_offload_and_reload, worker, plan)),
            Case(COPY, partial(_plain_copies, plan)),
        ]
        results = harness.measure(cases, plan.repeats, warmups=1)
    ratios = [Ratio(metric, f"offload {size}", COPY) for metric in ("to host GB/s", "to device GB/s")]
    return results, ratios, []


def generate(plan: Plan, directory: Path) -> TopicResult:
    """Measure the generation of completions of a fixed length."""
    size, notes = plan.sizes[0], []
    write_llama(directory, SIZES[size], plan.num_tokens, device=plan.device)
    engines: dict[str, Any] = {"torch": _torch_engine(plan, directory)}
    if importlib.util.find_spec("vllm") is not None:
        engines["vllm"] = _vllm_engine(plan, directory)
    else:
        notes.append("generate: vllm is not installed here; skipped")
    for engine in engines.values():
        _load_random_weights(engine, directory)
    cases = [Case(f"generate {name} {size}", partial(_complete, plan, engine)) for name, engine in engines.items()]
    results = harness.measure(cases, plan.repeats, warmups=1)
    if "vllm" in engines:
        engines["vllm"].shutdown()
    return results, [], notes


def grpo(plan: Plan, directory: Path) -> TopicResult:
    """Measure complete steps of the real training loop, per phase."""
    size = plan.sizes[0]
    write_llama(directory, SIZES[size], plan.num_tokens, device=plan.device)
    config = MasterConfig.model_validate(
        {
            "grpo": {
                "max_num_steps": plan.repeats + 1,
                "num_prompts_per_step": 2 * plan.batch,
                "num_generations_per_prompt": 8,
                "logprob_check": {"period": 1, "max_mean_error": 0.1},
            },
            "policy": {
                **_policy(plan),
                "offload": True,
                "generation": {"max_new_tokens": plan.num_tokens // 4, "precision": plan.precision},
            },
            "data": {"max_prompt_length": 16},
            "loss": {"kl_coef": 0.01},
            "checkpointing": {"enabled": False},
        }
    )
    job = make_job(directory, config, plan.device)
    recorder: Any = job.recorder
    job.run()
    job.policy.shutdown()
    results = Measurements()
    for step in recorder.steps[1:]:  # the first step allocates memory
        metrics = {name: value for name, value in step.items() if name.startswith(("timing/", "perf/"))}
        results.add(f"grpo step {size}", metrics | {"logprob error": step["train/logprob_error"]})
    return results, [], []


TOPICS = {
    "train": train,
    "offload": offload,
    "generate": generate,
    "weights": gpu_weights.measure_weights,
    "grpo": grpo,
}


# --- training --------------------------------------------------------------------------------------------------------


def _matmul(plan: Plan) -> Metrics:
    """Measure products of random matrices, with 2 n^3 FLOPs each. Chips are faster on zeros."""
    a, b = (torch.randn(plan.matmul, plan.matmul, dtype=torch.bfloat16, device=plan.device) for _ in range(2))
    for _ in range(3):
        a @ b
    seconds = _seconds(plan, lambda: [a @ b for _ in range(_PRODUCTS)])
    return {"TFLOP/s": _PRODUCTS * 2 * plan.matmul**3 / seconds / TERA}


def _policy(plan: Plan) -> dict[str, Any]:
    return {
        "precision": plan.precision,
        "max_sequence_length": plan.num_tokens,
        "train_micro_batch_size": plan.micro_batch,
        "logprob_batch_size": plan.micro_batch,
    }


@contextmanager
def _worker(backend: str, plan: Plan, model: Path) -> Iterator[Any]:
    worker = _make_worker(backend, plan, model)
    try:
        yield worker
    finally:
        worker.shutdown()


def _make_worker(backend: str, plan: Plan, model: Path) -> Any:
    config = PolicyConfig(model_name=str(model), backend=backend, **_policy(plan))
    if backend == "torch":
        return OneWorkerPolicy(config, total_steps=1000, device=plan.device).worker
    from nemo_rl.models.policy.megatron_policy_worker import MegatronPolicyWorker

    return MegatronPolicyWorker(config, total_steps=1000, seed=0, device_type=plan.device, weight_transport="local")


def _batch(plan: Plan, vocabulary: int) -> BatchedDataDict:
    shape = (plan.batch, plan.num_tokens)
    return BatchedDataDict(
        input_ids=torch.randint(vocabulary, shape),
        input_lengths=torch.full(shape[:1], plan.num_tokens),
        token_mask=torch.ones(shape),
        sample_mask=torch.ones(shape[:1]),
        advantages=torch.randn(shape[:1]),
    )


def _train_step(worker: Any, plan: Plan, size: ModelSize) -> Metrics:
    batch = _batch(plan, size.vocabulary)
    loss = ClippedPGLoss(LossConfig(importance_correction="none"))
    if plan.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _seconds(plan, lambda: worker.train(batch, loss))
    num_tokens = plan.batch * plan.num_tokens
    measured = {"tokens/s": num_tokens / seconds, "TFLOP/s": num_tokens * _flops(size, plan) / seconds / TERA}
    if plan.device == "cuda":
        measured["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return measured


def _flops(size: ModelSize, plan: Plan) -> float:
    """Return the FLOPs per token, forward and backward."""
    hidden = size.hidden
    attention = 2 * hidden * hidden + 2 * hidden * hidden // 4  # q and o; k and v have a quarter of the heads
    mlp = 3 * hidden * 4 * hidden
    matrices = size.num_layers * (attention + mlp) + size.vocabulary * hidden
    return 6 * matrices + 6 * plan.num_tokens * hidden * size.num_layers


# --- offload ---------------------------------------------------------------------------------------------------------


def _offload_and_reload(worker: Any, plan: Plan) -> Metrics:
    memory = worker._memory
    resident = _allocated(plan)
    out = _seconds(plan, worker.offload)
    remaining = _allocated(plan)
    back = _seconds(plan, lambda: memory.load(Part.WEIGHTS, Part.OPTIMIZER))
    num_bytes = sum(place.num_bytes for part in (Part.WEIGHTS, Part.OPTIMIZER) for place in memory._parts[part]._places)
    return {
        "to host GB/s": num_bytes / out / GIGA,
        "to device GB/s": num_bytes / back / GIGA,
        "here GiB": resident / 2**30,
        "away GiB": remaining / 2**30,
    }


def _plain_copies(plan: Plan) -> Metrics:
    num_bytes = (1 << 30) if plan.device == "cuda" else (1 << 20)
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=plan.device == "cuda")
    device = torch.ones(num_bytes, dtype=torch.uint8, device=plan.device)
    out = _seconds(plan, lambda: host.copy_(device, non_blocking=True))
    back = _seconds(plan, lambda: device.copy_(host, non_blocking=True))
    return {"to host GB/s": num_bytes / out / GIGA, "to device GB/s": num_bytes / back / GIGA}


# --- generation ------------------------------------------------------------------------------------------------------


def _generation(plan: Plan, **more: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=plan.num_tokens // 4, precision=plan.precision, **more)


def _generator_spec(plan: Plan, model: Path, config: GenerationConfig) -> GeneratorSpec:
    return GeneratorSpec(str(model), config, plan.num_tokens, use_gpu=plan.device == "cuda")


def _torch_engine(plan: Plan, model: Path) -> TorchGenerator:
    return TorchGenerator(_generator_spec(plan, model, _generation(plan)))


def _vllm_engine(plan: Plan, model: Path) -> Any:
    from nemo_rl.models.generation.vllm.environment import export_vllm_variables

    export_vllm_variables()
    from nemo_rl.models.generation.vllm.generator import VllmGenerator

    config = _generation(plan, backend="vllm", options={"gpu_memory_utilization": 0.5})
    return VllmGenerator(_generator_spec(plan, model, config))


def _load_random_weights(engine: Any, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    parameters = AutoModelForCausalLM.from_pretrained(model).named_parameters()
    engine.update_weights(publish(parameters, version=1, dtype=engine.spec.precision, transport="local"))


def _complete(plan: Plan, engine: Any) -> Metrics:
    """Measure tokens per second. A model with random weights rarely ends a completion before the limit."""
    rows = [make_tokenizer()(f"{number}+{number}=")["input_ids"] for number in range(10, 10 + plan.batch)]
    ids, lengths = torch.tensor(rows), torch.full((len(rows),), len(rows[0]))
    request = GenerationRequest(ids, lengths, seed=1, num_generations=16)
    results: list[Any] = []
    seconds = _seconds(plan, lambda: results.append(engine.generate(request)))
    [result] = results
    return {"tokens/s": float((result.output_lengths - result.prompt_lengths).sum()) / seconds}


def _seconds(plan: Plan, function: Callable[[], object]) -> float:
    """Return the seconds until all work that `function` submits to the device is done."""
    if plan.device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if plan.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def release_memory() -> None:
    """Release the memory of one measurement before the next one."""
    gc.unfreeze()  # workers freeze their objects
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _allocated(plan: Plan) -> int:
    return torch.cuda.memory_allocated() if plan.device == "cuda" else 0
