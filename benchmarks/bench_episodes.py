"""Measures episodes per second with environments whose steps take unevenly long, against two naive loops.

    uv run benchmarks/bench_episodes.py

A small Llama with random weights samples 8 tokens per turn, in this process. An episode has 1 to 8 turns, and a step
sleeps for 0.02 to 0.2 seconds, log-uniformly distributed ("uneven"), or not at all ("instant"). All loops play the same
episodes, which do not depend on what the model says.

| case | how it schedules the turns |
| --- | --- |
| ours | `EpisodeCollector`: waves of the transcripts that are ready |
| by turn | one batch: sample an action for each open episode, then take all steps at once, in threads; repeat |
| one by one | one episode after another (8 of them) |
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Case, Metrics, Ratio
from one_process import OneGenerator
from tiny_llama import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_rl.algorithms.episodes import EpisodeCollector
from nemo_rl.data.config import DataConfig
from nemo_rl.data.transcripts import TranscriptRenderer
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.environments.config import EpisodeLimits
from nemo_rl.environments.episode import Environment, Turn
from nemo_rl.environments.episode_host import EpisodeHost
from nemo_rl.models.generation.config import GenerationConfig
from nemo_rl.models.generation.generator import GeneratorSpec
from nemo_rl.models.generation.torch.generator import TorchGenerator
from nemo_rl.models.weights.sender import publish
from nemo_rl.observability.timer import Timer

NUM_EPISODES = 64
NUM_ONE_BY_ONE = 8
MAX_LENGTH = 256


class Uneven(Environment):
    """1 to 8 turns, each of which sleeps for `shortest_s` to ten times as long."""

    def __init__(self, shortest_s: float = 0.02) -> None:
        self.shortest_s = shortest_s

    def reset(self, problem: dict[str, Any]) -> str:
        self.random = random.Random(problem["seed"])
        self.left = self.random.randint(1, 8)
        return "12+34="

    def step(self, action: str) -> Turn:
        time.sleep(self.shortest_s * 10 ** self.random.random())
        self.left -= 1
        return Turn(1.0, "56+78=", done=self.left == 0)


def main() -> None:
    arguments = harness.parser(__doc__, repeats=3).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-episodes-") as scratch:
        generation, renderer = _generation(Path(scratch))
        loops = {
            "ours": lambda shortest_s: _ours(generation, renderer, shortest_s),
            "by turn": lambda shortest_s: _by_turn(generation, renderer, shortest_s, NUM_EPISODES),
            "one by one": lambda shortest_s: _one_by_one(generation, renderer, shortest_s),
        }
        cases = [Case(name, lambda loop=loop: _measure(loop)) for name, loop in loops.items()]
        results = harness.measure(cases, repeats=arguments.repeats, warmups=1)
    ratios = [
        Ratio("uneven, episodes/s", "ours", "by turn", at_least=3.0),
        Ratio("uneven, episodes/s", "ours", "one by one"),
        Ratio("instant, episodes/s", "ours", "by turn"),
    ]
    harness.report("episodes", results, ratios, arguments.json)


def _measure(loop: Callable[[float], int]) -> Metrics:
    metrics = {}
    for name, shortest_s in (("uneven", 0.02), ("instant", 0.0)):
        started = time.perf_counter()
        count = loop(shortest_s)
        metrics[f"{name}, episodes/s"] = count / (time.perf_counter() - started)
    return metrics


def _generation(directory: Path) -> tuple[OneGenerator, TranscriptRenderer]:
    make_model(directory)
    spec = GeneratorSpec(str(directory), GenerationConfig(max_new_tokens=8), MAX_LENGTH)
    generator = TorchGenerator(spec)
    model = AutoModelForCausalLM.from_pretrained(directory)
    generator.update_weights(publish(model.named_parameters(), version=1, dtype="float32", transport="local"))
    renderer = TranscriptRenderer(AutoTokenizer.from_pretrained(directory), DataConfig(), has_turns=True)
    return OneGenerator(generator), renderer


def _ours(generation: OneGenerator, renderer: TranscriptRenderer, shortest_s: float) -> int:
    host = EpisodeHost("bench_episodes.Uneven", {"shortest_s": shortest_s}, concurrency=NUM_EPISODES)
    collector = EpisodeCollector(
        {"uneven": host},
        {"uneven": EpisodeLimits()},
        generation,
        renderer,
        max_sequence_length=MAX_LENGTH,
        pad_token_id=0,
    )
    problems = BatchedDataDict(
        input_ids=torch.zeros(NUM_EPISODES, 1, dtype=torch.int64),
        input_lengths=torch.zeros(NUM_EPISODES, dtype=torch.int64),
        problem_index=torch.arange(NUM_EPISODES),
        question=[""] * NUM_EPISODES,
        answer=[""] * NUM_EPISODES,
        metadata=[{}] * NUM_EPISODES,
    )
    rollout = collector.collect(problems, num_generations=1, seed=0, timer=Timer())
    assert not rollout.failed.any()
    collector.close()
    host.shutdown()
    return NUM_EPISODES


def _by_turn(
    generation: OneGenerator, renderer: TranscriptRenderer, shortest_s: float, count: int, first: int = 0
) -> int:
    """Play episodes `first` to `first + count - 1` in one batch, turn by turn."""
    episodes = []
    for seed in range(first, first + count):
        environment = Uneven(shortest_s)
        text = environment.reset({"seed": seed})
        episodes.append((environment, renderer.opening([{"role": "user", "content": text}], [], "benchmark")))
    with ThreadPoolExecutor(count) as threads:
        while episodes:
            transcripts = [transcript for _, transcript in episodes]
            width = max(map(len, transcripts))
            prompts = BatchedDataDict(
                input_ids=torch.tensor([row + [0] * (width - len(row)) for row in transcripts]),
                input_lengths=torch.tensor([len(row) for row in transcripts]),
            )
            result = generation.generate(prompts, seed=0)
            turns = list(threads.map(lambda pair: pair[0][0].step(pair[1]), zip(episodes, result.texts, strict=True)))
            remaining = []
            for row, ((environment, _), turn) in enumerate(zip(episodes, turns, strict=True)):
                if not turn.done:
                    tokens = result.output_ids[row, : result.output_lengths[row]].tolist()
                    observation = [{"role": "user", "content": turn.observation}]
                    remaining.append((environment, tokens + renderer.continuation(observation, tokens)))
            episodes = remaining
    return count


def _one_by_one(generation: OneGenerator, renderer: TranscriptRenderer, shortest_s: float) -> int:
    return sum(_by_turn(generation, renderer, shortest_s, 1, first=seed) for seed in range(NUM_ONE_BY_ONE))


if __name__ == "__main__":
    main()
