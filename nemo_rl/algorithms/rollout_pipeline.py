"""Rollouts for the training loop, made when they are needed or some steps ahead.

::

    max_trajectory_age = 0:   rollout 1 | train 1 | rollout 2 | train 2 | ...
    max_trajectory_age = 1:   rollout 1 | rollout 2 | rollout 3 | ...        one thread, one rollout after the other
                                        | train 1   | train 2   | ...        the loop's own thread

The rollout of step n is made with the weights after step n - 1 - age. Which weights make which rollout follows from the
step alone, not from who happens to be faster, and rollouts that are ahead are part of a checkpoint: an asynchronous run
can be repeated and resumed like a synchronous one.

Where policy and generation share GPUs they take turns (`RolloutPipeline._turn`)::

    policy      | optimizer, gradients leave |                 | weights leave |                | come back as needed
    generation  |                            | weights: wake,  |               | cache: wakes,  | sleeps
                |                            | get the update  |               | completions    |

So nothing that one of the two needs is there with what only the other needs, except the weights of both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from nemo_rl.algorithms import rollouts
from nemo_rl.algorithms.advantages import group_has_signal
from nemo_rl.algorithms.config import GRPOConfig
from nemo_rl.algorithms.rollouts import Rollout, draw_seed
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import WeightSyncError
from nemo_rl.observability.timer import Timer
from nemo_rl.utils.futures import completed

if TYPE_CHECKING:
    from nemo_rl.environments.interfaces import EnvironmentInterface
    from nemo_rl.models.generation.config import SamplingConfig
    from nemo_rl.models.generation.interfaces import GenerationInterface
    from nemo_rl.models.weights.interfaces import WeightOffer, WeightUpdate

ResultT = TypeVar("ResultT")
Publish = Callable[[int], "WeightUpdate | WeightOffer"]


class Offload(Protocol):
    """See `PolicyInterface.offload`."""

    def __call__(self, *, keep_weights: bool) -> None: ...


class PromptLoader(Protocol):
    """Where problems come from, in an order that depends on nothing but seed and position."""

    def next_batch(self, num_problems: int) -> BatchedDataDict | None:
        """The next problems, or None when the allowed number of epochs is used up."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class StepRollout:
    """What one training step trains on.

    Attributes:
        step: the training step.
        version: of the weights that generated it.
        rollout: None when there are no more problems.
        num_rollouts: with dynamic sampling, how many it took.
        seconds: per phase ("weight_sync", "generation", "reward").
    """

    step: int
    version: int
    rollout: Rollout | None
    num_rollouts: int
    seconds: dict[str, float]


class RolloutPipeline:
    """Keeps up to `max_trajectory_age` rollouts ahead of the step that is being trained.

    Everything that generation does, validation as well, goes through here, one after the other: nobody else changes its
    weights. With `max_trajectory_age` 0 all of it happens in the caller's thread.

    Args:
        sleeps: generation gives its memory back between two rollouts, because the policy trains on the same GPUs.
        offload: `PolicyInterface.offload`, where the policy gives its memory to generation meanwhile.
    """

    def __init__(
        self,
        config: GRPOConfig,
        generation: GenerationInterface,
        environment: EnvironmentInterface,
        loader: PromptLoader,
        pad_token_id: int,
        *,
        sleeps: bool = False,
        offload: Offload | None = None,
    ) -> None:
        self._config = config
        self._generation = generation
        self._environment = environment
        self._loader = loader
        self._pad_token_id = pad_token_id
        self._sleeps = sleeps
        self._asleep = False
        self._offload = offload
        self._handed_over: int | None = None  # version of the weights that generation has or will have next
        self._ahead: deque[Future[StepRollout]] = deque()
        self._last_requested = 0  # steps are counted from 1
        self._thread = ThreadPoolExecutor(1, "rollouts") if config.max_trajectory_age else None

    def request(self, step: int, version: int, publish: Publish) -> None:
        """Ask for the rollouts of `step` and of those after it, as far ahead as allowed.

        Args:
            step: about to be trained.
            version: of the weights to generate with, those after `version` steps.
            publish: publishes them; called in this thread, and only if generation has not been given them yet.

        A step at which the log-probabilities are compared is not asked for ahead: only the weights that generated
        can tell whether both sides compute the same model.
        """
        following = max(step, self._last_requested + 1)
        furthest = min(step + self._config.max_trajectory_age, self._config.max_num_steps)
        while following <= furthest and (following == step or not self.is_check_step(following)):
            update = self._hand_over(version, publish)
            if update is not None and self._config.in_flight_weight_updates and self._is_rolling_out():
                self._serve(update, Timer(), in_flight=True)
                update = None
            self._ahead.append(self._run(partial(self._make, following, version, update)))
            self._last_requested = following
            following += 1

    def is_check_step(self, step: int) -> bool:
        """Whether the log-probabilities of generation and policy are compared at this step."""
        return step % self._config.logprob_check.period == 0

    def take(self) -> StepRollout:
        """The next step's rollout, waiting for it. Raises what making it raised."""
        return self._ahead.popleft().result()

    def validate(
        self,
        problems: BatchedDataDict,
        version: int,
        publish: Publish,
        *,
        num_generations: int,
        sampling: SamplingConfig | None,
    ) -> tuple[Rollout, dict[str, float]]:
        """Complete and judge validation problems with the weights after `version` steps; also the seconds per phase."""
        update = self._hand_over(version, publish)

        def job() -> tuple[Rollout, dict[str, float]]:
            timer = Timer()
            with self._turn(update, timer):
                rollout = rollouts.collect(
                    problems,
                    self._generation,
                    self._environment,
                    num_generations=num_generations,
                    seed=draw_seed(self._config.seed, "validation"),
                    timer=timer,
                    greedy=num_generations == 1 and sampling is None,
                    sampling=sampling,
                )
            return rollout, timer.seconds()

        return self._run(job).result()

    def save(self, directory: Path) -> dict[str, Any]:
        """Wait for the rollouts that are ahead and write them into `directory`; returns what `load` needs besides."""
        waiting = [future.result() for future in self._ahead]
        if waiting:
            torch.save([_to_plain(item) for item in waiting], directory / "rollouts.pt")
        return {"loader": self._loader.state_dict(), "num_rollouts_ahead": len(waiting)}

    def load(self, directory: Path, state: Mapping[str, Any]) -> None:
        """Restore what `save` wrote."""
        self._loader.load_state_dict(state["loader"])
        if state["num_rollouts_ahead"]:
            for plain in torch.load(directory / "rollouts.pt", weights_only=True):
                self._ahead.append(completed(_from_plain(plain)))
            self._last_requested = self._ahead[-1].result().step

    def close(self) -> None:
        """Drop what has been asked for and not begun."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(self, job: Callable[[], ResultT]) -> Future[ResultT]:
        return completed(job()) if self._thread is None else self._thread.submit(job)

    def _hand_over(self, version: int, publish: Publish) -> WeightUpdate | WeightOffer | None:
        if self._handed_over == version:
            return None
        self._handed_over = version
        return publish(version)

    def _make(self, step: int, version: int, update: WeightUpdate | WeightOffer | None) -> StepRollout:
        timer = Timer()
        problems = self._loader.next_batch(self._config.num_prompts_per_step)
        if problems is None:
            return StepRollout(step, version, None, 0, {})
        with self._turn(update, timer):
            rollout, num_rollouts = self._collect(problems, step, timer)
        return StepRollout(step, version, rollout, num_rollouts, timer.seconds())

    @contextmanager
    def _turn(self, update: WeightUpdate | WeightOffer | None, timer: Timer) -> Iterator[None]:
        """While the block runs generation can work, with the weights of `update`. See the module's diagram.

        The policy's weights may still be needed in the middle of it, for the successor of a worker that has died: they
        then come back, are sent, and leave again.
        """
        self._let_policy_leave(timer, keep_weights=update is not None)
        if update is not None:
            self._wake(timer, ["weights"])
            self._serve(update, timer)
            self._let_policy_leave(timer, keep_weights=False)
        self._wake(timer, ["kv_cache"] if update is not None else None)
        self._asleep = False
        yield
        if self._sleeps:
            with timer.phase("sleep"):
                self._generation.sleep()
            self._asleep = True

    def _let_policy_leave(self, timer: Timer, *, keep_weights: bool) -> None:
        if self._offload is not None:
            with timer.phase("offload"):
                self._offload(keep_weights=keep_weights)

    def _wake(self, timer: Timer, tags: list[str] | None) -> None:
        if self._asleep:
            with timer.phase("wake"):
                self._generation.wake(tags)

    def _is_rolling_out(self) -> bool:
        return any(not future.done() for future in self._ahead)

    def _serve(self, update: WeightUpdate | WeightOffer | None, timer: Timer, *, in_flight: bool = False) -> None:
        """Bring generation to the weights of `update`; both sides must report the same digest."""
        if update is None:
            return
        with timer.phase("weight_sync"):
            digest = self._generation.update_weights(update, in_flight=in_flight)
        if digest != update.digest:
            raise WeightSyncError(
                f"version {update.version}: generation reports weight digest {digest}, the policy published "
                f"{update.digest}"
            )

    def _collect(self, problems: BatchedDataDict, step: int, timer: Timer) -> tuple[Rollout, int]:
        """Roll out `problems`. With dynamic sampling, groups without signal are replaced by those of further problems
        (Yu et al. 2025, "DAPO", section 3.2); returns the rollout and how many it took."""
        config = self._config
        wanted = problems.size * config.num_generations_per_prompt
        limit = config.dynamic_sampling.max_generation_batches if config.dynamic_sampling.enabled else 1
        useful: list[Rollout] = []
        useless: list[Rollout] = []
        for attempt in range(limit):
            rollout = rollouts.collect(
                problems,
                self._generation,
                self._environment,
                num_generations=config.num_generations_per_prompt,
                seed=draw_seed(config.seed, "train", step, attempt),
                timer=timer,
                streaming=config.stream_rollouts,
            )
            if config.overlong_filtering:
                rollout.batch["sample_mask"] = (~rollout.truncated).float()
            if limit == 1:
                return rollout, 1
            signal = group_has_signal(rollout.batch["rewards"], rollout.batch["group"], rollout.batch["sample_mask"])
            useful.append(rollouts.select(rollout, signal))
            useless.append(rollouts.select(rollout, ~signal))
            if sum(len(r.completions) for r in useful) >= wanted:
                break
            following = self._loader.next_batch(problems.size)
            if following is None:
                break
            problems = following
        whole = rollouts.concatenate([r for r in (*useful, *useless) if r.completions], self._pad_token_id)
        return rollouts.select(whole, torch.arange(wanted)), attempt + 1


def _to_plain(item: StepRollout) -> dict[str, Any]:
    """Tensors, lists and numbers only, so that reading it back runs no code."""
    rollout = item.rollout
    plain = {"step": item.step, "version": item.version, "num_rollouts": item.num_rollouts, "seconds": item.seconds}
    if rollout is None:
        return {**plain, "rollout": None}
    fields = {name: getattr(rollout, name) for name in ("truncated", "prompts", "completions", "metrics")}
    return {**plain, "rollout": {**fields, "batch": dict(rollout.batch.get_dict())}}


def _from_plain(plain: Mapping[str, Any]) -> StepRollout:
    rollout = plain["rollout"]
    if rollout is not None:
        rollout = Rollout(**{**rollout, "batch": BatchedDataDict(rollout["batch"])})
    return StepRollout(**{**plain, "rollout": rollout})
