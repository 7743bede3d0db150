"""Compares vLLM in a worker group with vLLM in a plain process of the same venv.

Both sides complete the same prompts with the embedded model, in float32, on the same threads, with the same vLLM
limits. A run has warm-up rounds, and reports the median of the following rounds. The group's side includes all costs of
a job: sending prompts to the worker, sampling by (seed, row, token), both log-probabilities, and returning the results.
The direct side returns the log-probabilities of the sampled tokens, which a job needs, in one case, and only tokens in
the other case.

    uv run python benchmarks/bench_vllm_generation.py
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import harness
import tiny_llama
import torch
from harness import Case, Metrics, Ratio

BASELINE = Path(__file__).parent / "baselines" / "vllm_direct.py"


@dataclass(frozen=True)
class Settings:
    """Holds the settings of both sides. The baseline reads them as JSON."""

    model: str
    num_threads: int
    num_prompts: int
    num_generations: int
    prompt_length: int
    max_new_tokens: int
    num_rounds: int
    num_warmup_rounds: int = 2
    kv_cache_gib: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Tokens per round. No completion ends early."""
        return self.num_prompts * self.num_generations * self.max_new_tokens


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of the engine (default: 2)")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of one run (default: 5)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nemo_rl_bench_") as directory:
        model = Path(directory, "model")
        tiny_llama.make_model(model)
        settings = Settings(
            str(model),
            arguments.threads,
            arguments.prompts,
            arguments.generations,
            16,
            arguments.new_tokens,
            arguments.rounds,
        )
        python = ready_venv()

        def direct(logprobs: bool) -> Callable[[], Metrics]:
            return lambda: run_direct(python, settings, logprobs=logprobs)

        cases = [
            Case("group", lambda: run_group(settings)),
            Case("direct, logprobs", direct(True)),
            Case("direct, tokens only", direct(False)),
        ]
        results = harness.measure(cases, arguments.repeats)
    harness.report(
        "vllm_generation",
        results,
        [
            Ratio("tokens_per_s", "group", "direct, logprobs", at_least=0.98),
            Ratio("tokens_per_s", "group", "direct, tokens only"),
            Ratio("ready_s", "group", "direct, logprobs", at_most=1.2),
        ],
        arguments.json,
        title=f"vLLM on CPU: {arguments.prompts} prompts x {arguments.generations} of {arguments.new_tokens} tokens",
        details={"settings": {**asdict(settings), "model": "tiny_llama.py"}},
    )


def ready_venv() -> str:
    """Return the interpreter of the venv with vLLM's CPU build. Builds the venv if it is missing."""
    from nemo_rl import venvs
    from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES

    return venvs.create_local_venv(
        PY_EXECUTABLES.VLLM_CPU, "nemo_rl.models.generation.vllm.vllm_worker.VllmGenerationWorker"
    )


def run_direct(python: str, settings: Settings, *, logprobs: bool) -> Metrics:
    """Run a process that uses only vLLM's own `LLM`."""
    return harness.run_json([python, str(BASELINE), json.dumps(asdict(settings) | {"logprobs": logprobs})])


def run_group(settings: Settings) -> Metrics:
    """Run the same with `Generation` in a new process, so that every run starts from the same state as the baseline."""
    return harness.run_json([sys.executable, __file__, "--session", json.dumps(asdict(settings))], env=dict(os.environ))


def session(settings: Settings) -> None:
    """Run the group's side once and print its metrics."""
    import ray
    from transformers import AutoModelForCausalLM

    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.distributed.cluster.session import start_local_ray
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.models.generation.config import GenerationConfig
    from nemo_rl.models.generation.generation import Generation
    from nemo_rl.models.policy.config import PolicyConfig
    from nemo_rl.models.weights.sender import publish

    model = AutoModelForCausalLM.from_pretrained(settings.model)
    config = PolicyConfig(
        model_name=settings.model,
        max_sequence_length=settings.prompt_length + settings.max_new_tokens,
        generation=GenerationConfig(
            backend="vllm",
            max_new_tokens=settings.max_new_tokens,
            num_threads=settings.num_threads,
            max_batch_size=settings.num_prompts * settings.num_generations,
            options={"cpu_kv_cache_gib": settings.kv_cache_gib},
        ),
    )
    start_local_ray(num_cpus=settings.num_threads)
    cluster = RayVirtualCluster([1], use_gpus=False, name="bench")
    started = time.perf_counter()
    generation = Generation(cluster, config)
    generation.wait_ready()
    ready_s = time.perf_counter() - started
    update = publish(model.named_parameters(), version=1, dtype="float32")
    prompts = BatchedDataDict(
        input_ids=torch.tensor(prompt_tokens(settings)),
        input_lengths=torch.full((settings.num_prompts,), settings.prompt_length),
    )
    seconds, tokens = [], []
    for index in range(settings.num_warmup_rounds + settings.num_rounds):
        # A weight sync before every round, as in a job, so that the KV cache of the previous round is not reused.
        generation.update_weights(update)
        began = time.perf_counter()
        result = generation.generate(prompts, seed=index, num_generations=settings.num_generations)
        seconds.append(time.perf_counter() - began)
        tokens.append(int((result.output_lengths - result.prompt_lengths).sum()))
    generation.shutdown()
    cluster.shutdown()
    ray.shutdown()
    rates = [count / spent for count, spent in zip(tokens, seconds)][settings.num_warmup_rounds :]
    print(json.dumps({"tokens_per_s": statistics.median(rates), "ready_s": ready_s}))


def prompt_tokens(settings: Settings) -> list[list[int]]:
    """Return token ids of shape [num_prompts, prompt_length]. Prompts differ, but are the same for both sides."""
    return [
        [4 + (7 * prompt + 3 * position) % 90 for position in range(settings.prompt_length)]
        for prompt in range(settings.num_prompts)
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--session"]:
        session(Settings(**json.loads(sys.argv[2])))
    else:
        main()
