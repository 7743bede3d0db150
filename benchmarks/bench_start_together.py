"""Compares starting a vLLM group and a Megatron group together with each of them alone as a plain process.

    uv run benchmarks/bench_start_together.py

All venvs are ready, and Ray runs. `ready_s` of the groups is the time from the first constructor until both groups have
attested all workers. `ready_s` of a plain process is the time from its first line until the engine or worker can be
called, without Ray, without attestation and (vLLM) without a tokenizer. Everything runs on one machine, so groups that
start together share its cores.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import bench_vllm_generation
import harness
import tiny_llama
from bench_vllm_generation import Settings
from harness import Case, Metrics, Ratio

BASELINE = Path(__file__).parent / "baselines" / "megatron_direct.py"
MEGATRON = "nemo_rl.models.policy.megatron_policy_worker.MegatronPolicyWorker"


def main() -> None:
    arguments = harness.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="nemo_rl_bench_") as directory:
        model = Path(directory, "model")
        tiny_llama.make_model(model)
        settings = Settings(str(model), 1, 1, 1, 16, 2, num_rounds=1, num_warmup_rounds=0, kv_cache_gib=0.25)
        vllm = bench_vllm_generation.ready_venv()
        megatron = ready_venv()
        cases = [
            Case("both groups", lambda: run_groups(settings)),
            Case("vLLM alone", lambda: bench_vllm_generation.run_direct(vllm, settings, logprobs=True)),
            Case("Megatron alone", lambda: run_megatron(megatron, settings)),
        ]
        results = harness.measure(cases, arguments.repeats)
    harness.report(
        "start_together",
        results,
        [Ratio("ready_s", "both groups", "vLLM alone", at_most=1.2), Ratio("ready_s", "both groups", "Megatron alone")],
        arguments.json,
        title="seconds until ready, with existing venvs",
    )


def ready_venv() -> str:
    """Return the interpreter of Megatron's venv. Builds the venv if it is missing."""
    from nemo_rl import venvs
    from nemo_rl.distributed.ray_actor_environment_registry import get_actor_python_env

    return venvs.create_local_venv(get_actor_python_env(MEGATRON), MEGATRON)


def run_megatron(python: str, settings: Settings) -> Metrics:
    """Run the worker class in a plain process."""
    environment = {**os.environ, "PYTHONPATH": str(harness.REPOSITORY)}
    return harness.run_json([python, str(BASELINE), json.dumps(asdict(settings))], env=environment)


def run_groups(settings: Settings) -> Metrics:
    """Run both groups in a new process, so that every run starts from the same state as the baselines."""
    command = [sys.executable, __file__, "--session", json.dumps(asdict(settings))]
    return {"ready_s": harness.run_json(command, env=dict(os.environ))["ready_s"]}


def session(settings: Settings) -> None:
    """Run our side once. Prints the seconds until ready and the phases of the workers."""
    import ray

    from nemo_rl.distributed.cluster.session import start_local_ray
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.models.generation.config import GenerationConfig
    from nemo_rl.models.generation.generation import Generation
    from nemo_rl.models.policy.config import PolicyConfig
    from nemo_rl.models.policy.policy import Policy

    config = PolicyConfig(
        model_name=settings.model,
        backend="megatron",
        num_threads=settings.num_threads,
        max_sequence_length=settings.prompt_length + settings.max_new_tokens,
        generation=GenerationConfig(
            backend="vllm",
            max_new_tokens=settings.max_new_tokens,
            num_threads=settings.num_threads,
            options={"cpu_kv_cache_gib": settings.kv_cache_gib},
        ),
    )
    start_local_ray(num_cpus=2)
    cluster = RayVirtualCluster([1], use_gpus=False, max_colocated_worker_groups=2, name="bench")
    started, clock = time.perf_counter(), time.time()
    policy = Policy(cluster, config, total_steps=10, seed=0)
    generation = Generation(cluster, config)
    policy.wait_ready()
    generation.wait_ready()
    ready_s = time.perf_counter() - started
    phases: dict[str, dict[str, list[float]]] = {}
    for record in [*policy.attestation(), *generation.attestation()]:
        spans = {name: [round(start - clock, 2), round(end - clock, 2)] for name, start, end in record["phases"]}
        phases[record["name"]] = spans
    generation.shutdown()
    policy.shutdown()
    cluster.shutdown()
    ray.shutdown()
    print(json.dumps({"ready_s": ready_s, "phases": phases}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--session"]:
        session(Settings(**json.loads(sys.argv[2])))
    else:
        main()
