"""Measures episodes per second with environments whose steps take unevenly long, against two naive loops.

    uv run benchmarks/bench_episodes.py

A small Llama with random weights samples 4 tokens per turn, in this process. All loops play the same episodes, which do
not depend on what the model says. The duration of each step is drawn on its own:

| setting | turns of an episode | a step takes |
| --- | --- | --- |
| uneven | 1 to 8 | 0.02 to 0.2 s, log-uniformly distributed |
| rarely slow | 32 | 0.1 s; one step in ten takes 1 s |
| instant | 1 to 8 | no time |

| case | how it schedules the turns |
| --- | --- |
| ours | `EpisodeCollector`: waves of the transcripts that are ready |
| by turn | one batch: sample an action for each open episode, then take all steps at once, in threads; repeat |
| one by one | one episode after another (2 of them) |

The loop by turn takes at least the sum of each turn's slowest step. No loop takes less than the steps of the slowest
episode. The notes below the tables give both sums: their ratio is the best that any loop could reach if sampling took
no time.
"""

from __future__ import annotations

import itertools
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

SETTINGS = ("uneven", "rarely slow", "instant")
NUM_EPISODES = 32
NUM_ONE_BY_ONE = 2
MAX_LENGTH = 256


def durations(setting: str, seed: int) -> list[float]:
    """Return the seconds that each step of an episode takes."""
    chance = random.Random(seed)
    if setting == "rarely slow":
        return [1.0 if chance.random() < 0.1 else 0.1 for _ in range(32)]
    num_turns = chance.randint(1, 8)
    return [0.02 * 10 ** chance.random() if setting == "uneven" else 0.0 for _ in range(num_turns)]


class Tool(Environment):
    """Sleeps in each step as long as `durations` says."""

    def __init__(self, setting: str) -> None:
        self.setting = setting

    def reset(self, problem: dict[str, Any]) -> str:
        self.left = durations(self.setting, problem["seed"])
        return "12+34="

    def step(self, action: str) -> Turn:
        time.sleep(self.left.pop(0))
        return Turn(1.0, "+", done=not self.left)


def main() -> None:
    arguments = harness.parser(__doc__, repeats=3).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-episodes-") as scratch:
        generation, renderer = _generation(Path(scratch))
        loops = {
            "ours": lambda setting: _ours(generation, renderer, setting),
            "by turn": lambda setting: _by_turn(generation, renderer, setting, range(NUM_EPISODES)),
            "one by one": lambda setting: _one_by_one(generation, renderer, setting),
        }
        cases = [Case(name, lambda loop=loop: _measure(loop)) for name, loop in loops.items()]
        results = harness.measure(cases, repeats=arguments.repeats, warmups=1)
    ratios = [
        Ratio("uneven, episodes/s", "ours", "by turn"),
        Ratio("rarely slow, episodes/s", "ours", "by turn", at_least=3.0),
        Ratio("instant, episodes/s", "ours", "by turn"),
        Ratio("rarely slow, episodes/s", "ours", "one by one"),
    ]
    notes = [f"{setting}: {_bounds(setting)}" for setting in SETTINGS if setting != "instant"]
    harness.report("episodes", results, ratios, arguments.json, notes=notes)


def _measure(loop: Callable[[str], Metrics]) -> Metrics:
    return {f"{setting}, {name}": value for setting in SETTINGS for name, value in loop(setting).items()}


def _bounds(setting: str) -> str:
    steps = [durations(setting, seed) for seed in range(NUM_EPISODES)]
    by_turn = sum(max(turn) for turn in itertools.zip_longest(*steps, fillvalue=0.0))
    slowest = max(map(sum, steps))
    return (
        f"the steps take at least {by_turn:.1f} s by turn, and {slowest:.1f} s in any order, which is the slowest "
        f"episode: a ratio of {by_turn / slowest:.2f}"
    )


def _generation(directory: Path) -> tuple[OneGenerator, TranscriptRenderer]:
    make_model(directory)
    spec = GeneratorSpec(str(directory), GenerationConfig(max_new_tokens=4), MAX_LENGTH)
    generator = TorchGenerator(spec)
    model = AutoModelForCausalLM.from_pretrained(directory)
    generator.update_weights(publish(model.named_parameters(), version=1, dtype="float32", transport="local"))
    renderer = TranscriptRenderer(AutoTokenizer.from_pretrained(directory), DataConfig(), has_turns=True)
    return OneGenerator(generator), renderer


def _ours(generation: OneGenerator, renderer: TranscriptRenderer, setting: str) -> Metrics:
    host = EpisodeHost("bench_episodes.Tool", {"setting": setting}, concurrency=NUM_EPISODES)
    collector = EpisodeCollector(
        {"tool": host},
        {"tool": EpisodeLimits(max_turns=32)},
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
    started = time.perf_counter()
    rollout = collector.collect(problems, num_generations=1, seed=0, timer=Timer())
    seconds = time.perf_counter() - started
    assert not rollout.failed.any()
    assert not rollout.truncated.any()
    collector.close()
    host.shutdown()
    busy = rollout.metrics["generation_busy"]
    metrics = {"episodes/s": NUM_EPISODES / seconds, "generation busy": busy}
    if setting == "instant":
        num_turns = rollout.metrics["turns"] * NUM_EPISODES
        metrics["ms per turn without sampling"] = 1000 * seconds * (1 - busy) / num_turns
    return metrics


def _by_turn(generation: OneGenerator, renderer: TranscriptRenderer, setting: str, seeds: range) -> Metrics:
    """Play the episodes in one batch, turn by turn."""
    started = time.perf_counter()
    episodes = []
    for seed in seeds:
        environment = Tool(setting)
        text = environment.reset({"seed": seed})
        episodes.append((environment, renderer.opening([{"role": "user", "content": text}], [], "benchmark")))
    with ThreadPoolExecutor(len(seeds)) as threads:
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
    return {"episodes/s": len(seeds) / (time.perf_counter() - started)}


def _one_by_one(generation: OneGenerator, renderer: TranscriptRenderer, setting: str) -> Metrics:
    started = time.perf_counter()
    for seed in range(NUM_ONE_BY_ONE):
        _by_turn(generation, renderer, setting, range(seed, seed + 1))
    return {"episodes/s": NUM_ONE_BY_ONE / (time.perf_counter() - started)}


if __name__ == "__main__":
    main()
