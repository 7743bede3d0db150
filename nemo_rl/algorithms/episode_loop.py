"""The loop of a rollout of episodes: it decides what is sampled when, and what follows from each reply.

`episodes` describes waves, limits and failures. All state belongs to the thread that calls `EpisodeLoop.run`. Waves and
replies arrive from other threads as events.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypedDict

import torch

from nemo_rl.algorithms.episode_state import Episode, Reason
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.environments.episode_calls import Reply, Request
from nemo_rl.errors import DataError

if TYPE_CHECKING:
    from nemo_rl.data.transcripts import TranscriptRenderer
    from nemo_rl.environments.config import EpisodeLimits
    from nemo_rl.environments.episode_calls import EpisodeRunner
    from nemo_rl.models.generation.config import SamplingConfig
    from nemo_rl.models.generation.interfaces import GenerationInterface, GenerationResult

# Where one wave runs at a time: fraction of the last one's time that the first ready transcript waits for others.
_PATIENCE = 0.25


class Parts(Protocol):
    """What a loop works with; see `episodes.EpisodeCollector`."""

    runners: Mapping[str, EpisodeRunner]
    limits: Mapping[str, EpisodeLimits]
    generation: GenerationInterface
    renderer: TranscriptRenderer
    max_tokens: dict[str, int]
    max_retries: int
    wave_s: float


@dataclass(frozen=True)
class WaveResult:
    """Tells a loop what a wave, which has `started` then, has sampled; without a result, that the wave has ended."""

    loop: EpisodeLoop
    started: float
    episodes: list[Episode] = field(default_factory=list)
    result: GenerationResult | None = None


class Options(TypedDict):
    """How a rollout is sampled."""

    seed: int
    greedy: bool
    sampling: SamplingConfig | None


Event: TypeAlias = "Reply | WaveResult | BaseException"
Events: TypeAlias = "queue.SimpleQueue[Event]"


class EpisodeLoop:
    """Plays the episodes of one rollout.

    Args:
        parts: Environments, limits, generation and renderer.
        episodes: The episodes.
        options: How to sample.
        events: What waves and environments send.
        numbers: Numbers that no episode has.

    Attributes:
        generation_s: Seconds during which at least one wave ran.
    """

    def __init__(
        self,
        parts: Parts,
        episodes: list[Episode],
        options: Options,
        events: Events,
        numbers: Iterator[int],
    ) -> None:
        self._parts, self._episodes, self._options = parts, episodes, options
        self._events, self._numbers = events, numbers
        self._by_number = {episode.number: episode for episode in episodes}
        self._num_open = len(episodes)
        self._ready: dict[int, Episode] = {}  # by row, the longest waiting first
        self._num_sampling = 0
        self._deadlines: list[tuple[float, int, int]] = []  # a heap of (time, row, attempt)
        self._stopped = False
        self._num_waves = 0  # that run
        self._last_start = self._busy_since = 0.0
        self.generation_s = 0.0

    def run(self) -> None:
        """Play all episodes to their end. Raises the first error of generation or of an environment's worker."""
        try:
            self._begin(self._episodes)
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

    def _handle(self, event: Event) -> None:
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, Reply):
            self._on_reply(event)
        elif event.loop is self:  # else: of a rollout that ended with an error
            if event.result is None:
                self._on_wave_end(event.started)
            else:
                self._on_sampled(event.episodes, event.result)

    def _time_to_wait(self) -> float:
        """Seconds until a wave may start or a time limit is reached."""
        times = [time.monotonic() + 60.0]
        if self._ready and self._num_waves < self._max_waves:
            times.append(self._wave_time())
        if self._deadlines:
            times.append(self._deadlines[0][0])
        return max(min(times) - time.monotonic(), 0.0)

    # --- generation --------------------------------------------------------------------------------------------------

    @property
    def _max_waves(self) -> int:
        return self._parts.generation.max_concurrent_calls

    def _wave_time(self) -> float:
        """Return when the next wave may start, if others may still become ready."""
        if self._max_waves == 1:
            first = next(iter(self._ready.values()))
            return first.ready_since + _PATIENCE * self._parts.wave_s
        # Evenly spaced waves: the last of the calls is not taken before the first one ends.
        return self._last_start + self._parts.wave_s / self._max_waves

    def _start_wave(self) -> None:
        """Sample the next actions if it is time to."""
        if not self._ready or self._num_waves >= self._max_waves:
            return
        now = time.monotonic()
        others_come = self._num_open > len(self._ready) + self._num_sampling
        if others_come and now < self._wave_time():
            return
        episodes = list(self._ready.values())
        self._ready.clear()
        for episode in episodes:
            episode.state = "sampling"
        self._num_sampling += len(episodes)
        if not self._num_waves:
            self._busy_since = now
        self._num_waves += 1
        self._last_start = now
        threading.Thread(target=self._sample, args=[now, episodes], name="episodes: wave", daemon=True).start()

    def _sample(self, started: float, episodes: list[Episode]) -> None:
        """Run one wave, in a thread of its own."""
        try:
            transcripts = [episode.context() for episode in episodes]
            width = max(map(len, transcripts))
            padding = 0  # any token: no real token attends to padding
            prompts = BatchedDataDict(
                input_ids=torch.tensor([row + [padding] * (width - len(row)) for row in transcripts]),
                input_lengths=torch.tensor([len(row) for row in transcripts]),
            )
            rows = [episode.num_turns * len(self._episodes) + episode.row for episode in episodes]
            for positions, result in self._parts.generation.stream(prompts, rows=rows, **self._options):
                if self._stopped:
                    return
                self._events.put(WaveResult(self, started, [episodes[position] for position in positions], result))
            self._events.put(WaveResult(self, started))
        except BaseException as error:
            if not self._stopped:
                self._events.put(error)

    def _on_wave_end(self, started: float) -> None:
        now = time.monotonic()
        self._parts.wave_s = now - started
        self._num_waves -= 1
        if not self._num_waves:
            self.generation_s += now - self._busy_since

    def _on_sampled(self, episodes: list[Episode], result: GenerationResult) -> None:
        self._num_sampling -= len(episodes)
        starts, ends = result.prompt_lengths.tolist(), result.output_lengths.tolist()
        for index, episode in enumerate(episodes):
            end = min(ends[index], self._max_tokens(episode))
            span = slice(starts[index], end)
            tokens = result.output_ids[index, span].tolist()
            is_cut = end < ends[index]
            text = self._parts.renderer.text(tokens) if is_cut else result.texts[index]
            episode.act(
                tokens, result.logprobs[index, span].tolist(), result.sampling_logprobs[index, span].tolist(), text
            )
            episode.usage = {
                "prompt_tokens": starts[index],
                "completion_tokens": len(tokens),
                "truncated": is_cut or bool(result.truncated[index]),
            }
            episode.state = "environment"
        now = time.monotonic()
        late = [episode for episode in episodes if now >= self._deadline(episode)]
        for episode in late:
            self._end(episode, "timeout_s")
        self._submit([episode for episode in episodes if episode.state == "environment"], "step")

    # --- environments ------------------------------------------------------------------------------------------------

    def _begin(self, episodes: Sequence[Episode]) -> None:
        for episode in episodes:
            episode.begin()
            deadline = self._deadline(episode)
            if deadline < math.inf:
                heapq.heappush(self._deadlines, (deadline, episode.row, episode.attempts))
        self._submit(episodes, "reset")

    def _submit(self, episodes: Sequence[Episode], method: Literal["reset", "step", "close"]) -> None:
        requests: dict[str, list[Request]] = {}
        for episode in episodes:
            request = Request(episode.number, method)
            if method == "reset":
                request = Request(episode.number, method, episode.problem)
            elif method == "step":
                request = Request(episode.number, method, episode.messages[-1]["content"], episode.usage)
            requests.setdefault(episode.environment, []).append(request)
        for name, calls in requests.items():
            self._parts.runners[name].submit(calls)

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

    def _on_failure(self, episode: Episode, failure: str) -> None:
        episode.failure = failure
        if episode.attempts > self._parts.max_retries:
            self._end(episode, "failed")
            return
        self._begin([episode])

    def _on_reset(self, episode: Episode, value: Mapping[str, Any]) -> None:
        messages, tools = value["messages"], value["tools"]
        question = episode.problem["prompt"]
        try:
            if messages is None and not tools:
                if not question:
                    raise DataError("reset returned no observation, and the problem has no prompt")
                tokens = list(episode.prompt)
            else:
                if messages is None:
                    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
                tokens = self._opening(messages, tools)
        except DataError as error:
            self._on_failure(episode, f"env.{episode.environment}: {error}")
            return
        if len(tokens) >= self._max_tokens(episode):
            self._on_failure(
                episode,
                f"env.{episode.environment}: the first observation has {len(tokens)} tokens and leaves no "
                f"room for an action: a transcript may have {self._max_tokens(episode)}",
            )
            return
        episode.read(tokens, messages or [{"role": "user", "content": question}], continues=None)
        self._await_action(episode)

    def _on_turn(self, episode: Episode, value: Mapping[str, Any]) -> None:
        episode.rewards.append(value["reward"])
        episode.messages[-1]["reward"] = value["reward"]
        episode.info.update(value["info"])
        if value["answer"] is not None:
            episode.answer = value["answer"]
        messages = value["messages"] or []
        if value["done"] or value["truncated"] or episode.num_turns >= self._limits(episode).max_turns:
            episode.messages += messages
            self._end(episode, _end_of_turn(value))
            return
        continues = value.get("continues", episode.num_turns - 1)
        try:
            if continues is None:
                tokens = self._opening(messages, value["tools"])
            else:
                transcript, end = episode.actions[continues]
                tokens = self._parts.renderer.continuation(messages, transcript.tokens[end - 1 : end])
        except DataError as error:
            self._on_failure(episode, f"env.{episode.environment}: {error}")
            return
        episode.read(tokens, messages, continues=continues)
        if len(episode.context()) >= self._max_tokens(episode):
            self._end(episode, "max_tokens")
        else:
            self._await_action(episode)

    def _opening(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[int]:
        return self._parts.renderer.opening(messages, tools, "the first observation of a conversation")

    def _await_action(self, episode: Episode) -> None:
        episode.state = "ready"
        episode.ready_since = time.monotonic()
        self._ready[episode.row] = episode

    def _deadline(self, episode: Episode) -> float:
        limit = self._limits(episode).timeout_s
        return math.inf if limit is None else episode.started + limit

    def _end_late_episodes(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            _, row, attempt = heapq.heappop(self._deadlines)
            episode = self._episodes[row]
            # An episode whose action is being sampled ends when it has its action.
            if episode.attempts == attempt and episode.state in ("environment", "ready"):
                self._ready.pop(row, None)
                self._on_late(episode)

    def _on_late(self, episode: Episode) -> None:
        # Without an action there is nothing to train on, and nothing that the model could have done.
        if episode.num_turns:
            self._end(episode, "timeout_s")
            return
        # A late reply must not be taken for one of the next attempt.
        self._submit([episode], "close")
        del self._by_number[episode.number]
        episode.number = next(self._numbers)
        self._by_number[episode.number] = episode
        limit = self._limits(episode).timeout_s
        self._on_failure(episode, f"env.{episode.environment}: no action within timeout_s={limit:g}")

    def _end(self, episode: Episode, reason: Reason) -> None:
        episode.state, episode.reason = "ended", reason
        self._num_open -= 1
        self._submit([episode], "close")

    def _limits(self, episode: Episode) -> EpisodeLimits:
        return self._parts.limits[episode.environment]

    def _max_tokens(self, episode: Episode) -> int:
        return self._parts.max_tokens[episode.environment]


def _end_of_turn(value: Mapping[str, Any]) -> Reason:
    if value["truncated"]:
        return "truncated"
    return "done" if value["done"] else "max_turns"
