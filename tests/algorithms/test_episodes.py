"""The loop of episodes: transcripts, limits, failures and waves, with environments in this process."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch

from nemo_rl.algorithms.episodes import EpisodeCollector
from nemo_rl.algorithms.rollouts import Rollout
from nemo_rl.data.config import DataConfig
from nemo_rl.data.transcripts import TranscriptRenderer
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.environments.config import EpisodeLimits
from nemo_rl.environments.episode import Environment, Turn
from nemo_rl.environments.episode_host import EpisodeHost
from nemo_rl.errors import EnvironmentFailure
from nemo_rl.models.embedded import make_tokenizer
from nemo_rl.models.generation.interfaces import GenerationResult
from nemo_rl.models.generation.results import Completion, make_result
from nemo_rl.observability.timer import Timer

TOKENIZER = make_tokenizer()


class Countdown(Environment):
    """Asks for numbers until they sum up to the seed of the problem. Each number is a reward."""

    def reset(self, problem: dict[str, Any]) -> str:
        self.left = problem["seed"]
        return f"{self.left} left\n"

    def step(self, action: str) -> Turn:
        self.left -= int(action)
        return Turn(float(action), f"\n{self.left} left\n", done=self.left <= 0, info={"left": self.left})


class Answers(Countdown):
    """The number of a problem above 2 is an answer. Fails once after the first one of problem 5."""

    failed: ClassVar[bool] = False

    def step(self, action: str) -> Turn:
        if self.left == 4 and not Answers.failed:
            Answers.failed = True
            raise ConnectionError("the server is gone")
        turn = super().step(action)
        return dataclasses.replace(turn, answer=f"{self.left} left" if self.left > 2 else None)


class Flaky(Countdown):
    """Fails at the first step of the first attempt at each problem."""

    failed: ClassVar[set[int]] = set()

    def step(self, action: str) -> Turn:
        if self.left not in self.failed:
            self.failed.add(self.left)
            raise ConnectionError("the server is gone")
        return super().step(action)


class FailsOn(Countdown):
    """Always fails for the seed 3."""

    def step(self, action: str) -> Turn:
        if self.left == 3:
            raise ConnectionError("the server is gone")
        return super().step(action)


class Slow(Countdown):
    """Waits for an event in each step with an odd seed."""

    go: ClassVar[threading.Event] = threading.Event()

    def reset(self, problem: dict[str, Any]) -> str:
        self.waits = problem["seed"] % 2
        return super().reset(problem)

    def step(self, action: str) -> Turn:
        if self.waits:
            assert self.go.wait(60)
        return super().step(action)


class Late(Countdown):
    """With the seed 4, begins after an event."""

    go: ClassVar[threading.Event] = threading.Event()

    def reset(self, problem: dict[str, Any]) -> str:
        if problem["seed"] == 4:
            assert self.go.wait(60)
        return super().reset(problem)


class Scripted:
    """Samples what a function answers to the text of a transcript. Log-probabilities tell row and token."""

    def __init__(self, answer: Callable[[str], str], max_concurrent_calls: int = 1) -> None:
        self.answer, self.max_concurrent_calls = answer, max_concurrent_calls
        self.waves: list[list[int]] = []

    def stream(self, prompts: BatchedDataDict, *, seed: int, greedy: bool, sampling: Any, rows: list[int]) -> Iterator:
        lengths = prompts["input_lengths"].tolist()
        transcripts = [ids[:length] for ids, length in zip(prompts["input_ids"].tolist(), lengths, strict=True)]
        self.waves.append(list(rows))
        for position, (transcript, row) in enumerate(zip(transcripts, rows, strict=True)):
            text = self.answer(TOKENIZER.decode(transcript, skip_special_tokens=True))
            tokens = torch.tensor(
                [*TOKENIZER([text], add_special_tokens=False)["input_ids"][0], TOKENIZER.eos_token_id]
            )
            logprobs = -(row + 1.0) - torch.arange(len(tokens)) / 100
            completion = Completion(tokens, logprobs, logprobs - 0.5, truncated=False)
            result: GenerationResult = make_result(
                [transcript], [completion], tokenizer=TOKENIZER, weights_version=0, where="scripted"
            )
            yield [position], result


def problems(*seeds: int, environment: list[str] | None = None) -> BatchedDataDict:
    count = len(seeds)
    batch = BatchedDataDict(
        input_ids=torch.zeros(count, 1, dtype=torch.int64),
        input_lengths=torch.zeros(count, dtype=torch.int64),
        problem_index=torch.tensor(seeds),
        prompt=[""] * count,
        question=[""] * count,
        answer=[""] * count,
        metadata=[{"seed": seed} for seed in seeds],
    )
    if environment is not None:
        batch["environment"] = environment
    return batch


@pytest.fixture(autouse=True)
def stopped() -> Iterator[None]:
    """Let no slow step outlast its test."""
    Slow.go.clear()
    yield
    Slow.go.set()


@pytest.fixture
def collect() -> Iterator[Callable[..., Rollout]]:
    open_things: list[Any] = []

    def run(
        batch: BatchedDataDict,
        environments: dict[str, type] | type,
        answer: Callable[[str], str] | Scripted,
        *,
        num_generations: int = 1,
        limits: EpisodeLimits | None = None,
        **options: Any,
    ) -> Rollout:
        if isinstance(environments, type):
            environments = {"game": environments}
        hosts = {name: EpisodeHost(f"{cls.__module__}.{cls.__name__}", {}) for name, cls in environments.items()}
        renderer = TranscriptRenderer(TOKENIZER, DataConfig(), has_turns=True)
        generation = answer if isinstance(answer, Scripted) else Scripted(answer)
        collector = EpisodeCollector(
            hosts,
            dict.fromkeys(hosts, limits or EpisodeLimits()),
            generation,
            renderer,
            **{"max_sequence_length": 200, "pad_token_id": TOKENIZER.pad_token_id, **options},
        )
        open_things.extend([collector.close, *(host.shutdown for host in hosts.values())])
        return collector.collect(batch, num_generations=num_generations, seed=1, timer=Timer())

    yield run
    for close in open_things:
        close()


def all_left(text: str) -> str:
    """Answer with the number that is left."""
    return text.split()[-2]


def one(text: str) -> str:
    return "1"


def test_transcript_holds_what_was_sampled(collect) -> None:
    generation = Scripted(one)
    rollout = collect(problems(2, 1), Countdown, generation, num_generations=2)
    batch = rollout.batch
    text = [TOKENIZER.decode(row[:length]) for row, length in zip(batch["input_ids"], batch["input_lengths"])]
    assert text == ["2 left\n1<eos>\n1 left\n1<eos>"] * 2 + ["1 left\n1<eos>"] * 2
    assert batch["rewards"].tolist() == [2, 2, 1, 1]
    assert batch["group"].tolist() == [0, 0, 1, 1]
    assert batch["sample_mask"].tolist() == [1, 1, 1, 1]
    # The first turn of sample 1 draws from row 1, the second from row 4 + 1.
    assert sorted(row for wave in generation.waves for row in wave) == [0, 1, 2, 3, 4, 5]
    sampled = batch["token_mask"][1].bool()
    assert TOKENIZER.decode(batch["input_ids"][1][sampled]) == "1<eos>1<eos>"
    expected = torch.tensor([-2.0, -2.01, -6.0, -6.01])
    torch.testing.assert_close(batch["generation_logprobs"][1][sampled], expected)
    torch.testing.assert_close(batch["sampling_logprobs"][1][sampled], expected - 0.5)
    assert not batch["generation_logprobs"][~batch["token_mask"].bool()].any()
    assert rollout.prompts[0] == "2 left\n"
    assert rollout.completions[0] == "1\n1 left\n1"
    assert not rollout.truncated.any()
    assert not rollout.failed.any()
    assert rollout.metrics["turns"] == 1.5
    assert rollout.metrics["game/left"] == 0
    assert rollout.episodes[0]["messages"] == [
        {"role": "user", "content": "2 left\n"},
        {"role": "assistant", "content": "1", "reward": 1.0},
        {"role": "user", "content": "\n1 left\n"},
        {"role": "assistant", "content": "1", "reward": 1.0},
        {"role": "user", "content": "\n0 left\n"},
    ]


def test_last_answer_of_an_episode_counts(collect) -> None:
    rollout = collect(problems(2, 5, 4), Answers, one)
    assert Answers.failed
    assert rollout.answers == [None, "3 left", "3 left"]


@pytest.mark.parametrize(
    ("limits", "options", "reason", "num_turns"),
    [
        ({"max_turns": 3}, {}, "max_turns", 3),
        ({"max_tokens": 22}, {}, "max_tokens", 2),
        ({}, {"max_sequence_length": 22}, "max_tokens", 2),
    ],
)
@pytest.mark.parametrize("treatment", ["count", "mask"])
def test_limits_cut_an_episode_off(collect, limits, options, reason, num_turns, treatment) -> None:
    rollout = collect(problems(9), Countdown, one, limits=EpisodeLimits(**limits, truncated=treatment), **options)
    [episode] = rollout.episodes
    assert (episode["end"], episode["turns"]) == (reason, num_turns)
    assert rollout.truncated.tolist() == [True]
    assert rollout.batch["sample_mask"].tolist() == [treatment == "count"]
    assert rollout.batch["rewards"].tolist() == [num_turns]
    assert int(rollout.batch["input_lengths"]) <= options.get("max_sequence_length", limits.get("max_tokens", 200))
    assert rollout.batch["token_mask"][0, -1]  # no observation after the last action


def test_action_is_cut_at_the_token_limit(collect) -> None:
    rollout = collect(problems(9), Countdown, lambda text: "0" * 30, limits=EpisodeLimits(max_tokens=20))
    assert rollout.batch["input_lengths"].tolist() == [20]
    assert rollout.episodes[0]["end"] == "max_tokens"
    assert rollout.episodes[0]["messages"][1]["content"] == "0" * 13


def test_time_limit(collect) -> None:
    rollout = collect(problems(2, 3), Slow, one, limits=EpisodeLimits(timeout_s=1))
    assert [episode["end"] for episode in rollout.episodes] == ["done", "timeout_s"]
    assert rollout.truncated.tolist() == [False, True]


def test_time_limit_while_an_action_is_sampled(collect) -> None:
    def answer(text: str) -> str:
        time.sleep(0.5)
        return "1"

    rollout = collect(problems(2), Countdown, answer, limits=EpisodeLimits(timeout_s=0.3))
    [episode] = rollout.episodes
    assert (episode["end"], episode["turns"], episode["reward"]) == ("timeout_s", 1, 0)


def test_failed_episode_is_repeated(collect) -> None:
    Flaky.failed.clear()
    rollout = collect(problems(4, 5), Flaky, all_left)
    assert [episode["attempts"] for episode in rollout.episodes] == [2, 2]
    assert rollout.batch["rewards"].tolist() == [4, 5]
    assert rollout.batch["sample_mask"].tolist() == [1, 1]
    assert rollout.metrics["retried"] == 1.0
    assert "the server is gone" in rollout.episodes[0]["failure"]


def test_failure_is_masked_within_the_budget(collect) -> None:
    rollout = collect(problems(2, 3), FailsOn, all_left, max_failed_fraction=0.5)
    assert rollout.failed.tolist() == [False, True]
    assert rollout.scored.tolist() == [True, False]
    assert rollout.batch["sample_mask"].tolist() == [1, 0]
    assert rollout.episodes[1]["reward"] is None
    assert rollout.episodes[1]["outcome"] == "masked"
    assert rollout.episodes[1]["attempts"] == 3
    assert rollout.metrics["reward"] == 2  # the failed one has none


def test_failures_beyond_the_budget_end_the_run(collect) -> None:
    with pytest.raises(EnvironmentFailure, match=r"1 of 2 episodes failed.*max_failed_fraction=0.4.*server is gone"):
        collect(problems(2, 3), FailsOn, all_left, max_failed_fraction=0.4)


def test_first_observation_without_room_is_a_failure(collect) -> None:
    with pytest.raises(EnvironmentFailure, match=r"the first observation has 7 tokens .* may have 7"):
        collect(problems(2), Countdown, one, max_sequence_length=7)


def test_error_of_generation_ends_the_rollout(collect) -> None:
    def broken(text: str) -> str:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        collect(problems(2), Countdown, broken)


def test_fast_episodes_do_not_wait_for_slow_ones(collect) -> None:
    """The slow episode is released by the last action of the fast one, which has several turns."""

    def answer(text: str) -> str:
        if text.splitlines()[0] == "4 left" and text.rstrip().endswith("\n1 left"):
            Slow.go.set()
        return "1"

    rollout = collect(problems(4, 3), Slow, answer)
    assert rollout.batch["rewards"].tolist() == [4, 3]


def test_ready_transcript_does_not_wait_for_the_running_wave(collect) -> None:
    """The first wave ends after all actions of the other episode, which begins while this wave runs."""
    Late.go.clear()
    others_done = threading.Event()

    def answer(text: str) -> str:
        if text == "3 left\n":
            Late.go.set()
            assert others_done.wait(60)
        if text.startswith("4 left") and text.endswith("\n1 left\n"):
            others_done.set()
        return "1"

    generation = Scripted(answer, max_concurrent_calls=2)
    rollout = collect(problems(3, 4), Late, generation)
    assert rollout.batch["rewards"].tolist() == [3, 4]
    assert generation.waves[:5] == [[0], [1], [3], [5], [7]]
    assert 0 < rollout.metrics["generation_busy"] <= 1


@pytest.mark.parametrize("max_concurrent_calls", [1, 3])
def test_waves_are_limited(collect, max_concurrent_calls: int) -> None:
    lock = threading.Lock()
    running: list[int] = []

    class Counting(Scripted):
        def stream(self, *arguments: Any, **options: Any) -> Iterator:
            with lock:
                running.append(running[-1] + 1 if running else 1)
            time.sleep(0.02)
            yield from super().stream(*arguments, **options)
            with lock:
                running.append(running[-1] - 1)

    generation = Counting(one, max_concurrent_calls)
    rollout = collect(problems(*range(1, 9)), Countdown, generation, num_generations=4)
    assert rollout.batch["rewards"].tolist() == [seed for seed in range(1, 9) for _ in range(4)]
    assert max(running) <= max_concurrent_calls


def test_environments_are_mixed_in_one_rollout(collect) -> None:
    batch = problems(2, 3, environment=["a", "b"])
    rollout = collect(batch, {"a": Countdown, "b": FailsOn}, one, num_generations=2, max_failed_fraction=0.9)
    assert [episode["environment"] for episode in rollout.episodes] == ["a", "a", "b", "b"]
    assert rollout.metrics["a/failed"] == 0
    assert rollout.metrics["b/failed"] == 1
    assert rollout.batch["rewards"].tolist() == [2, 2, 0, 0]


def test_rollouts_do_not_see_replies_of_earlier_ones(collect) -> None:
    hosts = {"game": EpisodeHost(f"{__name__}.Slow", {})}
    renderer = TranscriptRenderer(TOKENIZER, DataConfig(), has_turns=True)
    collector = EpisodeCollector(
        hosts, {"game": EpisodeLimits(timeout_s=0.3)}, Scripted(one), renderer, max_sequence_length=200, pad_token_id=0
    )
    first = collector.collect(problems(1), num_generations=1, seed=1, timer=Timer())
    assert first.episodes[0]["end"] == "timeout_s"
    Slow.go.set()
    second = collector.collect(problems(1), num_generations=1, seed=1, timer=Timer())
    assert second.episodes[0]["end"] == "done"
    assert second.episodes[0]["turns"] == 1
    collector.close()
    hosts["game"].shutdown()
