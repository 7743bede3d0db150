"""vLLM through a worker group, against vLLM called directly by a plain process of the same venv.

Both sides complete the same prompts with the embedded model, in float32, on the same threads, with the same limits of
vLLM's; a run is some warm-up rounds and then the median round. The group's side includes everything a job pays: sending
prompts to the worker, drawing by (seed, row, token), both log-probabilities, the results on their way back. The direct
side asks for the log-probabilities of the sampled tokens, which a job needs, in one case; in the other for tokens only.

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

RIVAL = Path(__file__).parent / "rivals" / "vllm_direct.py"


@dataclass(frozen=True)
class Settings:
    """What both sides are told; the rival reads it as JSON."""

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
        """Tokens of one round: nothing ends a completion early."""
        return self.num_prompts * self.num_generations * self.max_new_tokens


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--threads", type=int, default=2, help="of the engine (default: 2)")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="counted in one run (default: 5)")
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
            Ratio("tokens_per_s", "group", "direct, logprobs", at_least=0.95),
            Ratio("tokens_per_s", "group", "direct, tokens only"),
            Ratio("ready_s", "group", "direct, logprobs", at_most=1.2),
        ],
        arguments.json,
        title=f"vLLM on CPU: {arguments.prompts} prompts x {arguments.generations} of {arguments.new_tokens} tokens",
        details={"settings": {**asdict(settings), "model": "tiny_llama.py"}},
    )


def ready_venv() -> str:
    """The interpreter of the CPU build's venv, built now if need be."""
    from nemo_rl import venvs
    from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES

    return venvs.create_local_venv(
        PY_EXECUTABLES.VLLM_CPU, "nemo_rl.models.generation.vllm.vllm_worker.VllmGenerationWorker"
    )


def run_direct(python: str, settings: Settings, *, logprobs: bool) -> Metrics:
    """A process that uses nothing but vLLM's own `LLM`."""
    return harness.run_json([python, str(RIVAL), json.dumps(asdict(settings) | {"logprobs": logprobs})])


def run_group(settings: Settings) -> Metrics:
    """The same through `Generation`, in a process of its own: every run starts from nothing, as the rival's does."""
    return harness.run_json([sys.executable, __file__, "--session", json.dumps(asdict(settings))], env=dict(os.environ))


def session(settings: Settings) -> None:
    """One run of the group's side; prints its metrics."""
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
        # A sync before every round, as in a job: no keys and values are left from the round before.
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
    """[num_prompts, prompt_length]: different prompts, the same for both sides."""
    return [
        [4 + (7 * prompt + 3 * position) % 90 for position in range(settings.prompt_length)]
        for prompt in range(settings.num_prompts)
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--session"]:
        session(Settings(**json.loads(sys.argv[2])))
    else:
        main()
