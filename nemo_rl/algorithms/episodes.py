"""Collects episodes: the model and the environments take turns, until every episode of a rollout has ended.

::

    environments  ──observations──►  ready transcripts ──wave──►  generation
         ▲                                                            │
         └──────────────────────── actions ◄──as they are sampled─────┘

A wave is one call of generation that samples the next action of every transcript that is ready. While it runs, the
environments work on the actions of earlier waves, and those of the running one as they arrive. So a slow environment
delays its own episodes only. Waves overlap where generation runs several calls at a time (n): the next one starts when
no further observation is on its way, or 1/n of a wave's time after the start of the last one. With n=1 it starts after
the end of the last one, when the first ready transcript has waited for a quarter of the time that the last wave took.

A transcript is token ids. What was sampled stays as it was sampled (`nemo_rl.data.transcripts`); all else is masked. An
agent may have several transcripts in one episode, its branches (`nemo_rl.environments.agent`).
The random stream of an action depends on the seed, the sample and the turn, not on the wave. (The rounding of sums
depends on the batch, so environments with uneven latencies can still change a sampled token.)

A failure of an environment is never a reward. The episode is repeated from its seed, up to `max_retries` times, and
then left out of the loss and of its group's baseline.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nemo_rl.algorithms import episode_state, rollouts
from nemo_rl.algorithms.episode_loop import EpisodeLoop, Events, Options
from nemo_rl.algorithms.episode_state import Episode, Transcript
from nemo_rl.algorithms.rollouts import Rollout
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import EnvironmentFailure

if TYPE_CHECKING:
    from nemo_rl.data.transcripts import TranscriptRenderer
    from nemo_rl.environments.config import EpisodeLimits
    from nemo_rl.environments.episode_calls import EpisodeRunner
    from nemo_rl.environments.interfaces import EnvironmentInterface
    from nemo_rl.models.generation.config import SamplingConfig
    from nemo_rl.models.generation.interfaces import GenerationInterface
    from nemo_rl.observability.timer import Timer

_FIRST_WAVE_S = 0.4
_POLL_S = 0.5
_MAX_REASONS = 3


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
        self.wave_s = _FIRST_WAVE_S  # the time that the last wave took
        self._pad_token_id, self._max_failed_fraction = pad_token_id, max_failed_fraction
        self._numbers = itertools.count()
        self._events: Events = queue.SimpleQueue()
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
        options: Options = {"seed": seed, "greedy": greedy, "sampling": sampling}
        for name in sorted({episode.environment for episode in episodes} - self._receivers):
            self._receivers.add(name)
            threading.Thread(target=self._receive, args=[name], name=f"episodes of {name}", daemon=True).start()
        with timer.phase("generation"):
            started = time.monotonic()
            loop = EpisodeLoop(self, episodes, options, self._events, self._numbers)
            loop.run()
            loop_s = time.monotonic() - started
        failed = [episode for episode in episodes if episode.reason == "failed"]
        if len(failed) > self._max_failed_fraction * len(episodes):
            raise EnvironmentFailure(_too_many(failed, len(episodes), self._max_failed_fraction))
        metrics = episode_state.metrics(episodes) | {"generation_busy": loop.generation_s / max(loop_s, 1e-9)}
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

    def _episodes(self, problems: BatchedDataDict, num_generations: int) -> list[Episode]:
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
                episodes.append(Episode(row, next(self._numbers), names[index], record, prompt))
        return episodes

    def _rollout(self, episodes: list[Episode], num_generations: int, metrics: dict[str, float]) -> Rollout:
        counts = [self._counts(episode) for episode in episodes]
        turn_rewards = torch.zeros(len(episodes), max(max(episode.num_turns for episode in episodes), 1))
        for row, episode in enumerate(episodes):
            turn_rewards[row, : len(episode.rewards)] = torch.tensor(episode.rewards)
        batch = self._rows([episode.transcripts[0] for episode in episodes])
        batch["sample_mask"] = torch.tensor(counts, dtype=torch.float32)
        batch["group"] = torch.arange(len(episodes) // num_generations).repeat_interleave(num_generations)
        batch["rewards"] = torch.tensor([sum(episode.rewards) for episode in episodes], dtype=torch.float32)
        batch["turn_rewards"] = turn_rewards
        batch["num_turns"] = torch.tensor([episode.num_turns for episode in episodes])
        text = self.renderer.text
        firsts = [episode.transcripts[0] for episode in episodes]
        return Rollout(
            batch=batch,
            truncated=torch.tensor([episode.reason not in ("done", "failed") for episode in episodes]),
            prompts=[text(first.tokens[: first.num_prompt_tokens]) for first in firsts],
            completions=[text(first.tokens[first.num_prompt_tokens :]) for first in firsts],
            metrics=metrics,
            failed=torch.tensor([episode.reason == "failed" for episode in episodes]),
            episodes=[episode_state.record(episode, counted) for episode, counted in zip(episodes, counts)],
            branches=self._branches(episodes),
            answers=[episode.answer for episode in episodes],
        )

    def _branches(self, episodes: Sequence[Episode]) -> BatchedDataDict | None:
        """Return the further transcripts of the episodes that have not failed. None: there are none."""
        found = [
            (row, transcript)
            for row, episode in enumerate(episodes)
            if episode.reason != "failed"
            for transcript in episode.transcripts[1:]
            if transcript.is_trained
        ]
        if not found:
            return None
        batch = self._rows([transcript for _, transcript in found])
        batch["sample"] = torch.tensor([row for row, _ in found])
        return batch

    def _rows(self, transcripts: Sequence[Transcript]) -> BatchedDataDict:
        """Return transcripts as rows of a training batch, padded on the right."""
        size, width = len(transcripts), max(max(len(transcript.tokens) for transcript in transcripts), 1)
        input_ids = torch.full((size, width), self._pad_token_id)
        turn_index = torch.zeros(size, width, dtype=torch.int64)
        logprobs, sampling_logprobs = torch.zeros(2, size, width)
        for row, transcript in enumerate(transcripts):
            end = len(transcript.tokens)
            input_ids[row, :end] = torch.tensor(transcript.tokens, dtype=torch.int64)
            turn_index[row, :end] = torch.tensor(transcript.turns, dtype=torch.int64)
            logprobs[row, :end] = torch.tensor(transcript.logprobs)
            sampling_logprobs[row, :end] = torch.tensor(transcript.sampling_logprobs)
        return BatchedDataDict(
            input_ids=input_ids,
            input_lengths=torch.tensor([max(len(transcript.tokens), 1) for transcript in transcripts]),
            token_mask=(turn_index > 0).float(),
            generation_logprobs=logprobs,
            sampling_logprobs=sampling_logprobs,
            turn_index=turn_index,
        )

    def _counts(self, episode: Episode) -> bool:
        """Return whether the episode is trained on."""
        if episode.reason in ("done", "failed"):
            return episode.reason == "done"
        return self.limits[episode.environment].truncated == "count"


def collect_rollout(
    problems: BatchedDataDict,
    generation: GenerationInterface,
    environment: EnvironmentInterface | EpisodeCollector,
    *,
    streaming: bool = False,
    while_grading: Callable[[BatchedDataDict], None] = lambda batch: None,
    **options: Any,
) -> Rollout:
    """Collect one rollout, from an environment that scores batches or from episodes.

    Args:
        problems, generation, environment: See `rollouts.collect` and `EpisodeCollector`.
        streaming: See `rollouts.collect`; episodes are always streamed.
        while_grading: See `rollouts.collect`; not called for episodes, whose turns are graded one by one.
        options: What both functions accept: `num_generations`, `seed`, `timer`, `greedy` and `sampling`.
    """
    if isinstance(environment, EpisodeCollector):
        return environment.collect(problems, **options)
    return rollouts.collect(
        problems, generation, environment, streaming=streaming, while_grading=while_grading, **options
    )


def _too_many(failed: list[Episode], count: int, allowed: float) -> str:
    reasons = Counter(episode.failure for episode in failed).most_common(_MAX_REASONS)
    lines = "; ".join(f"{number} times: {reason}" for reason, number in reasons)
    return f"{len(failed)} of {count} episodes failed, more than env.max_failed_fraction={allowed:g} allows. {lines}"
