"""Collects episodes: the model and the environments take turns, until every episode of a rollout has ended.

::

    environments  ──observations──►  ready transcripts ──wave──►  generation
         ▲                                                            │
         └──────────────────────── actions ◄──as they are sampled─────┘

A wave is one call of generation that samples the next action of every transcript that is ready. While it runs, the
environments work on the actions of earlier waves, and those of the running one as they arrive. So a slow environment
delays its own episodes only. The next wave starts when no further observation is on its way, or when the first ready
transcript has waited for a quarter of the time that the last wave took.

A transcript is token ids. What was sampled stays as it was sampled (`nemo_rl.data.transcripts`); all else is masked.
The random stream of an action depends on the seed, the sample and the turn, not on the wave. (The rounding of sums
depends on the batch, so environments with uneven latencies can still change a sampled token.)

A failure of an environment is never a reward. The episode is repeated from its seed, up to `max_retries` times, and
then left out of the loss and of its group's baseline.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import torch

from nemo_rl.algorithms.rollouts import Rollout
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.environments.episode_calls import Reply, Request
from nemo_rl.errors import DataError, EnvironmentFailure

if TYPE_CHECKING:
    from nemo_rl.data.transcripts import TranscriptRenderer
    from nemo_rl.environments.config import EpisodeLimits
    from nemo_rl.environments.episode_calls import EpisodeRunner
    from nemo_rl.models.generation.config import SamplingConfig
    from nemo_rl.models.generation.interfaces import GenerationInterface, GenerationResult
    from nemo_rl.observability.timer import Timer

# Fraction of the last wave's time that the first ready transcript waits for others.
_PATIENCE = 0.25
_FIRST_PATIENCE_S = 0.1
_POLL_S = 0.5
_MAX_REASONS = 3

# Why an episode ended. The limits cut it off.
Reason = Literal["done", "truncated", "max_turns", "max_tokens", "timeout_s", "failed"]


@dataclass
class _Episode:
    """One episode of a rollout.

    Attributes:
        row: Position among the samples of the rollout.
        number: Id for the environment.
        environment: Name of the environment.
        problem: What `reset` receives.
        prompt: Tokens of the problem's own prompt, for environments whose `reset` returns no observation.
        state: Whom it waits for.
        tokens: The transcript; `sampled` says which tokens were sampled, with their log-probabilities.
        num_prompt_tokens: Tokens before the first action.
        pending: Tokens of the observation that follows the last action. They join the transcript with the next action.
        messages: The conversation as text, for people.
        attempts: How often it has begun.
    """

    row: int
    number: int
    environment: str
    problem: dict[str, Any]
    prompt: list[int]
    state: Literal["environment", "ready", "sampling", "ended"] = "environment"
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    turn_ends: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    pending: list[int] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    info: dict[str, float] = field(default_factory=dict)
    environment_s: float = 0.0
    attempts: int = 0
    started: float = 0.0
    ready_since: float = 0.0
    reason: Reason = "done"
    failure: str = ""

    @property
    def num_turns(self) -> int:
        return len(self.turn_ends)

    def begin(self) -> None:
        """Forget the attempt before, if there was one."""
        self.tokens, self.sampled, self.logprobs, self.sampling_logprobs = [], [], [], []
        self.turn_ends, self.pending, self.messages, self.rewards = [], [], [], []
        self.info = {}
        self.num_prompt_tokens, self.environment_s = 0, 0.0
        self.attempts += 1
        self.started = time.monotonic()
        self.state = "environment"

    def append(self, tokens: Sequence[int], logprobs: Sequence[float], sampling_logprobs: Sequence[float]) -> None:
        """Append the observation that was read and the action that was sampled."""
        zeros = [0.0] * len(self.pending)
        self.tokens += [*self.pending, *tokens]
        self.sampled += [False] * len(self.pending) + [True] * len(tokens)
        self.logprobs += [*zeros, *logprobs]
        self.sampling_logprobs += [*zeros, *sampling_logprobs]
        if not self.turn_ends:
            self.num_prompt_tokens = len(self.pending)
        self.turn_ends.append(len(self.tokens))
        self.pending = []


@dataclass(frozen=True)
class _WaveResult:
    """Tells a loop what a wave has sampled; without a result, that the wave has ended."""

    loop: _Loop
    episodes: list[_Episode] = field(default_factory=list)
    result: GenerationResult | None = None


class _Options(TypedDict):
    seed: int
    greedy: bool
    sampling: SamplingConfig | None


_Event: TypeAlias = "Reply | _WaveResult | BaseException"
_Events: TypeAlias = "queue.SimpleQueue[_Event]"


class EpisodeCollector:
    """Collects the episodes of a job. Its environments run elsewhere; see the module's diagram. Not thread-safe.

    Example:

        host = EpisodeHost("my_package.games.Nim", {})
        collector = EpisodeCollector({"nim": host}, {"nim": EpisodeLimits()}, generation, renderer,
                                     max_sequence_length=512, pad_token_id=0)
        rollout = collector.collect(problems, num_generations=8, seed=1, timer=Timer())

    Args:
        runners: The environments, by name.
        limits: Limits of the episodes of each environment.
        generation: Samples the actions.
        renderer: Renders observations as tokens.
        max_sequence_length: Most tokens of a transcript.
        pad_token_id: Fills the rows of the batch.
        max_retries: How often a failed episode is repeated.
        max_failed_fraction: Most episodes of a rollout that may fail for good, as a fraction.
    """

    def __init__(
        self,
        runners: Mapping[str, EpisodeRunner],
        limits: Mapping[str, EpisodeLimits],
        generation: GenerationInterface,
        renderer: TranscriptRenderer,
        *,
        max_sequence_length: int,
        pad_token_id: int,
        max_retries: int = 2,
        max_failed_fraction: float = 0.1,
    ) -> None:
        self.runners, self.generation, self.renderer = runners, generation, renderer
        self.limits, self.max_retries = limits, max_retries
        self.max_tokens = {
            name: min(limit.max_tokens or max_sequence_length, max_sequence_length) for name, limit in limits.items()
        }
        self.patience_s = _FIRST_PATIENCE_S
        self._pad_token_id, self._max_failed_fraction = pad_token_id, max_failed_fraction
        self._numbers = itertools.count()
        self._events: _Events = queue.SimpleQueue()
        self._receivers: set[str] = set()
        self._stopped = threading.Event()

    def close(self) -> None:
        """End the threads that receive replies. The environments are their owner's to shut down."""
        self._stopped.set()

    def collect(
        self,
        problems: BatchedDataDict,
        *,
        num_generations: int,
        seed: int,
        timer: Timer,
        greedy: bool = False,
        sampling: SamplingConfig | None = None,
    ) -> Rollout:
        """Play `num_generations` episodes of each problem.

        Args:
            problems: N rows as `nemo_rl.data.collation.collate` returns them, with the name of each problem's
                environment in the list `environment`; without this list, there must be one environment.
            num_generations: Episodes per problem (G). Row n * G + g of the result is episode g of problem n.
            seed: Decides every sampled token.
            timer: Receives the phase "generation".
            greedy: Take the most likely token instead of sampling.
            sampling: Overrides the configured temperature, top-p and top-k.

        Raises:
            EnvironmentFailure: More episodes failed than `max_failed_fraction` allows, or an environment has died.
        """
        episodes = self._episodes(problems, num_generations)
        options: _Options = {"seed": seed, "greedy": greedy, "sampling": sampling}
        for name in sorted({episode.environment for episode in episodes} - self._receivers):
            self._receivers.add(name)
            threading.Thread(target=self._receive, args=[name], name=f"episodes of {name}", daemon=True).start()
        with timer.phase("generation"):
            started = time.monotonic()
            loop = _Loop(self, episodes, options, self._events, self._numbers)
            loop.run()
            loop_s = time.monotonic() - started
        failed = [episode for episode in episodes if episode.reason == "failed"]
        if len(failed) > self._max_failed_fraction * len(episodes):
            raise EnvironmentFailure(_too_many(failed, len(episodes), self._max_failed_fraction))
        metrics = _metrics(episodes) | {"generation_busy": loop.generation_s / max(loop_s, 1e-9)}
        return self._rollout(episodes, num_generations, metrics)

    def _receive(self, name: str) -> None:
        """Forward the replies of one environment, until `close`."""
        try:
            while not self._stopped.is_set():
                for reply in self.runners[name].collect(_POLL_S):
                    self._events.put(reply)
        except BaseException as error:
            self._receivers.discard(name)
            self._events.put(error)

    def _episodes(self, problems: BatchedDataDict, num_generations: int) -> list[_Episode]:
        names = problems.get("environment") or [*self.runners] * problems.size
        lengths = problems["input_lengths"].tolist()
        prompts = problems["input_ids"].tolist()
        episodes = []
        for index in range(problems.size):
            record = {
                "seed": int(problems["problem_index"][index]),
                **problems["metadata"][index],
                "prompt": problems["question"][index],
                "answer": problems["answer"][index],
            }
            for generation in range(num_generations):
                row = index * num_generations + generation
                prompt = prompts[index][: lengths[index]]
                episodes.append(_Episode(row, next(self._numbers), names[index], record, prompt))
        return episodes

    def _rollout(self, episodes: list[_Episode], num_generations: int, metrics: dict[str, float]) -> Rollout:
        counts = [self._counts(episode) for episode in episodes]
        width = max(max(len(episode.tokens) for episode in episodes), 1)
        size = len(episodes)
        input_ids = torch.full((size, width), self._pad_token_id)
        token_mask, logprobs, sampling_logprobs = torch.zeros(3, size, width)
        for row, episode in enumerate(episodes):
            end = len(episode.tokens)
            input_ids[row, :end] = torch.tensor(episode.tokens, dtype=torch.int64)
            token_mask[row, :end] = torch.tensor(episode.sampled, dtype=torch.float32)
            logprobs[row, :end] = torch.tensor(episode.logprobs)
            sampling_logprobs[row, :end] = torch.tensor(episode.sampling_logprobs)
        batch = BatchedDataDict(
            input_ids=input_ids,
            input_lengths=torch.tensor([max(len(episode.tokens), 1) for episode in episodes]),
            token_mask=token_mask,
            sample_mask=torch.tensor(counts, dtype=torch.float32),
            generation_logprobs=logprobs,
            sampling_logprobs=sampling_logprobs,
            group=torch.arange(size // num_generations).repeat_interleave(num_generations),
            rewards=torch.tensor([sum(episode.rewards) for episode in episodes], dtype=torch.float32),
        )
        text = self.renderer.text
        turn_index = torch.zeros(size, width, dtype=torch.int64)
        turn_rewards = torch.zeros(size, max(max(episode.num_turns for episode in episodes), 1))
        for row, episode in enumerate(episodes):
            turn_rewards[row, : len(episode.rewards)] = torch.tensor(episode.rewards)
            for turn, (start, end) in enumerate(pairwise([0, *episode.turn_ends]), start=1):
                turn_index[row, start:end] = turn
        batch["turn_index"] = turn_index * (token_mask > 0)
        batch["turn_rewards"] = turn_rewards
        return Rollout(
            batch=batch,
            truncated=torch.tensor([episode.reason not in ("done", "failed") for episode in episodes]),
            prompts=[text(episode.tokens[: episode.num_prompt_tokens]) for episode in episodes],
            completions=[text(episode.tokens[episode.num_prompt_tokens :]) for episode in episodes],
            metrics=metrics,
            failed=torch.tensor([episode.reason == "failed" for episode in episodes]),
            episodes=[_record(episode, counted) for episode, counted in zip(episodes, counts, strict=True)],
        )

    def _counts(self, episode: _Episode) -> bool:
        """Return whether the episode is trained on."""
        if episode.reason in ("done", "failed"):
            return episode.reason == "done"
        return self.limits[episode.environment].truncated == "count"


class _Loop:
    """The loop of one rollout. All its state belongs to the thread that calls `run`; others only send events."""

    def __init__(
        self,
        collector: EpisodeCollector,
        episodes: list[_Episode],
        options: _Options,
        events: _Events,
        numbers: Iterator[int],
    ) -> None:
        self._collector, self._episodes, self._options = collector, episodes, options
        self._events, self._numbers = events, numbers
        self._by_number = {episode.number: episode for episode in episodes}
        self._num_open = len(episodes)
        self._stopped = False
        self._is_sampling = False
        self._wave_started = 0.0
        self.generation_s = 0.0

    def run(self) -> None:
        """Play all episodes to their end. Raises the first error of generation or of an environment's worker."""
        for episode in self._episodes:
            episode.begin()
        try:
            self._submit(self._episodes, "reset")
            while self._num_open:
                with contextlib.suppress(queue.Empty):
                    self._handle(self._events.get(timeout=self._time_to_wait()))
                    while True:
                        self._handle(self._events.get_nowait())
                self._end_late_episodes()
                self._start_wave()
        finally:
            self._stopped = True
            with contextlib.suppress(Exception):  # after an error, whose report matters more
                self._submit([episode for episode in self._episodes if episode.state != "ended"], "close")

    def _handle(self, event: _Event) -> None:
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, Reply):
            self._on_reply(event)
        elif event.loop is self:  # else: of a rollout that ended with an error
            if event.result is None:
                self._on_wave_end()
            else:
                self._on_sampled(event.episodes, event.result)

    def _time_to_wait(self) -> float:
        """Seconds until a wave may start or a time limit is reached."""
        now, wait = time.monotonic(), 60.0
        if not self._is_sampling:
            since = [episode.ready_since for episode in self._episodes if episode.state == "ready"]
            if since:
                wait = min(since) + self._collector.patience_s - now
        for episode in self._episodes:
            limit = self._limits(episode).timeout_s
            if limit is not None and episode.state in ("environment", "ready"):
                wait = min(wait, episode.started + limit - now)
        return max(wait, 0.0)

    # --- generation --------------------------------------------------------------------------------------------------

    def _start_wave(self) -> None:
        """Sample the next actions if it is time to."""
        ready = [episode for episode in self._episodes if episode.state == "ready"]
        if self._is_sampling or not ready:
            return
        now = time.monotonic()
        others_come = any(episode.state == "environment" for episode in self._episodes)
        if others_come and now < min(episode.ready_since for episode in ready) + self._collector.patience_s:
            return
        for episode in ready:
            episode.state = "sampling"
        self._wave_started, self._is_sampling = now, True
        threading.Thread(target=self._sample, args=[ready], name="episodes: wave", daemon=True).start()

    def _sample(self, episodes: list[_Episode]) -> None:
        """Run one wave, in a thread of its own."""
        try:
            transcripts = [[*episode.tokens, *episode.pending] for episode in episodes]
            width = max(map(len, transcripts))
            padding = 0  # any token: no real token attends to padding
            prompts = BatchedDataDict(
                input_ids=torch.tensor([row + [padding] * (width - len(row)) for row in transcripts]),
                input_lengths=torch.tensor([len(row) for row in transcripts]),
            )
            rows = [episode.num_turns * len(self._episodes) + episode.row for episode in episodes]
            for positions, result in self._collector.generation.stream(prompts, rows=rows, **self._options):
                if self._stopped:
                    return
                self._events.put(_WaveResult(self, [episodes[position] for position in positions], result))
            self._events.put(_WaveResult(self))
        except BaseException as error:
            if not self._stopped:
                self._events.put(error)

    def _on_wave_end(self) -> None:
        self._is_sampling = False
        wave_s = time.monotonic() - self._wave_started
        self.generation_s += wave_s
        self._collector.patience_s = _PATIENCE * wave_s

    def _on_sampled(self, episodes: list[_Episode], result: GenerationResult) -> None:
        starts, ends = result.prompt_lengths.tolist(), result.output_lengths.tolist()
        for index, episode in enumerate(episodes):
            end = min(ends[index], self._max_tokens(episode))
            span = slice(starts[index], end)
            tokens = result.output_ids[index, span].tolist()
            episode.append(
                tokens, result.logprobs[index, span].tolist(), result.sampling_logprobs[index, span].tolist()
            )
            text = result.texts[index] if end == ends[index] else self._collector.renderer.text(tokens)
            episode.messages.append({"role": "assistant", "content": text})
            episode.state = "environment"
        self._submit(episodes, "step")

    # --- environments ------------------------------------------------------------------------------------------------

    def _submit(self, episodes: Sequence[_Episode], method: Literal["reset", "step", "close"]) -> None:
        requests: dict[str, list[Request]] = {}
        for episode in episodes:
            argument: Any = None
            if method == "reset":
                argument = episode.problem
            elif method == "step":
                argument = episode.messages[-1]["content"]
            requests.setdefault(episode.environment, []).append(Request(episode.number, method, argument))
        for name, calls in requests.items():
            self._collector.runners[name].submit(calls)

    def _on_reply(self, reply: Reply) -> None:
        episode = self._by_number.get(reply.episode)
        if episode is None or episode.state != "environment":
            return  # of an earlier rollout, or of an episode that has been cut off
        episode.environment_s += reply.seconds
        if reply.failure is not None:
            self._on_failure(episode, reply.failure)
        elif episode.num_turns:
            self._on_turn(episode, reply.value or {})
        else:
            self._on_reset(episode, reply.value or {})

    def _on_failure(self, episode: _Episode, failure: str) -> None:
        episode.failure = failure
        if episode.attempts > self._collector.max_retries:
            self._end(episode, "failed")
            return
        episode.begin()
        self._submit([episode], "reset")

    def _on_reset(self, episode: _Episode, value: Mapping[str, Any]) -> None:
        messages, tools = value["messages"], value["tools"]
        question = episode.problem["prompt"]
        try:
            if messages is None and not tools:
                if not question:
                    raise DataError("reset returned no observation, and the problem has no prompt")
                episode.pending = list(episode.prompt)
            else:
                if messages is None:
                    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
                episode.pending = self._collector.renderer.opening(messages, tools, "the observation of reset")
        except DataError as error:
            self._on_failure(episode, f"env.{episode.environment}: {error}")
            return
        episode.messages += messages or [{"role": "user", "content": question}]
        if len(episode.pending) >= self._max_tokens(episode):
            self._on_failure(
                episode,
                f"env.{episode.environment}: the first observation has {len(episode.pending)} tokens and leaves no "
                f"room for an action: a transcript may have {self._max_tokens(episode)}",
            )
            return
        self._await_action(episode)

    def _on_turn(self, episode: _Episode, value: Mapping[str, Any]) -> None:
        limits = self._limits(episode)
        episode.rewards.append(value["reward"])
        episode.messages[-1]["reward"] = value["reward"]
        episode.info.update(value["info"])
        episode.messages += value["messages"] or []
        if value["done"] or value["truncated"]:
            self._end(episode, "truncated" if value["truncated"] else "done")
        elif episode.num_turns >= limits.max_turns:
            self._end(episode, "max_turns")
        else:
            try:
                episode.pending = self._collector.renderer.continuation(value["messages"], episode.tokens[-1:])
            except DataError as error:
                self._on_failure(episode, f"env.{episode.environment}: {error}")
                return
            if len(episode.tokens) + len(episode.pending) >= self._max_tokens(episode):
                self._end(episode, "max_tokens")
            else:
                self._await_action(episode)

    def _await_action(self, episode: _Episode) -> None:
        episode.state = "ready"
        episode.ready_since = time.monotonic()

    def _end_late_episodes(self) -> None:
        now = time.monotonic()
        for episode in self._episodes:
            limit = self._limits(episode).timeout_s
            if limit is not None and episode.state in ("environment", "ready") and now >= episode.started + limit:
                # Without an action there is nothing to train on, and nothing that the model could have done.
                if episode.num_turns:
                    self._end(episode, "timeout_s")
                else:
                    # A late reply must not be taken for one of the next attempt.
                    self._submit([episode], "close")
                    del self._by_number[episode.number]
                    episode.number = next(self._numbers)
                    self._by_number[episode.number] = episode
                    self._on_failure(episode, f"env.{episode.environment}: no action within timeout_s={limit:g}")

    def _end(self, episode: _Episode, reason: Reason) -> None:
        episode.state, episode.reason = "ended", reason
        self._num_open -= 1
        self._submit([episode], "close")

    def _limits(self, episode: _Episode) -> EpisodeLimits:
        return self._collector.limits[episode.environment]

    def _max_tokens(self, episode: _Episode) -> int:
        return self._collector.max_tokens[episode.environment]


def _record(episode: _Episode, counted: bool) -> dict[str, Any]:
    """Return what is kept of an episode for people, as JSON data."""
    return {
        "environment": episode.environment,
        "problem": episode.problem["seed"],
        "sample": episode.row,
        "reward": None if episode.reason == "failed" else sum(episode.rewards),
        "turns": episode.num_turns,
        "tokens": len(episode.tokens),
        "end": episode.reason,
        "outcome": "trained" if counted else "masked",
        "failure": episode.failure,
        "attempts": episode.attempts,
        "messages": [dict(message) for message in episode.messages],
    }


def _too_many(failed: list[_Episode], count: int, allowed: float) -> str:
    reasons = Counter(episode.failure for episode in failed).most_common(_MAX_REASONS)
    lines = "; ".join(f"{number} times: {reason}" for reason, number in reasons)
    return f"{len(failed)} of {count} episodes failed, more than env.max_failed_fraction={allowed:g} allows. {lines}"


def _metrics(episodes: list[_Episode]) -> dict[str, float]:
    """Return the metrics of all episodes, and those of each environment with its name and a slash before them."""
    metrics = _metrics_of(episodes)
    for name in sorted({episode.environment for episode in episodes}):
        chosen = [episode for episode in episodes if episode.environment == name]
        metrics |= {f"{name}/{key}": value for key, value in _metrics_of(chosen).items()}
    return metrics


def _metrics_of(episodes: list[_Episode]) -> dict[str, float]:
    valid = [episode for episode in episodes if episode.reason != "failed"]
    metrics = {
        "failed": 1.0 - len(valid) / len(episodes),
        "retried": sum(episode.attempts - 1 for episode in episodes) / len(episodes),
    }
    if not valid:
        return metrics
    turns = sum(episode.num_turns for episode in valid)
    metrics |= {
        "reward": sum(sum(episode.rewards) for episode in valid) / len(valid),
        "turns": turns / len(valid),
        "cut_off": sum(episode.reason != "done" for episode in valid) / len(valid),
        "step_s": sum(episode.environment_s for episode in valid) / max(turns, 1),
    }
    names = {name for episode in valid for name in episode.info}
    for name in sorted(names):
        values = [episode.info[name] for episode in valid if name in episode.info]
        metrics[name] = sum(values) / len(values)
    return metrics
