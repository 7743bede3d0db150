"""Produces rollouts for the training loop, on request or up to `max_trajectory_age` steps ahead.

::

    max_trajectory_age = 0:   rollout 1 | train 1 | rollout 2 | train 2 | ...
    max_trajectory_age = 1:   rollout 1 | rollout 2 | rollout 3 | ...        rollout thread
                                        | train 1   | train 2   | ...        training loop

The rollout of step n uses the weights after step max(0, n - 1 - age); steps that check log-probabilities use n - 1.
This depends only on the number of the step, not on the speed of the two threads, and checkpoints include the rollouts
that are ahead. Asynchronous runs are therefore as reproducible as synchronous ones, also after a resume. The exception
is `in_flight_weight_updates`, which loads new weights during a rollout at a moment that depends on timing.

Policy and generation alternate on shared GPUs (`RolloutPipeline._generation_turn`)::

    policy      | offload optimizer   |                    | offload  |                  | reload on demand
                | and gradients       |                    | weights  |                  |
    generation  |                     | wake weights,      |          | wake KV cache,   | sleep
                |                     | update weights     |          | generate         |

At most the two sets of weights are in GPU memory together, and only during the weight update.
"""

from __future__ import annotations

import dataclasses
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
from nemo_rl.algorithms.config import OnPolicyConfig
from nemo_rl.algorithms.episodes import collect_rollout
from nemo_rl.algorithms.rollouts import Rollout, draw_seed, validation_options
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import WeightSyncError
from nemo_rl.observability.timer import Timer
from nemo_rl.utils.futures import completed

if TYPE_CHECKING:
    from nemo_rl.algorithms.episodes import EpisodeCollector
    from nemo_rl.environments.interfaces import EnvironmentInterface
    from nemo_rl.models.generation.config import SamplingConfig
    from nemo_rl.models.generation.interfaces import GenerationInterface
    from nemo_rl.models.weights.interfaces import WeightOffer, WeightUpdate

ResultT = TypeVar("ResultT")
Publish = Callable[[int], "WeightUpdate | WeightOffer"]
WhileGrading = Callable[[BatchedDataDict], None]


class Offload(Protocol):
    """See `PolicyInterface.offload`."""

    def __call__(self, *, keep_weights: bool) -> None: ...


class PromptLoader(Protocol):
    """Yields problems in an order that depends only on the seed and the position."""

    def next_batch(self, num_problems: int) -> BatchedDataDict | None:
        """Return the next problems, or None after the last epoch."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class StepRollout:
    """Holds the rollout of one training step.

    Attributes:
        step: the training step.
        version: version of the weights when the rollout was requested; in-flight updates may have loaded newer ones
            during it.
        rollout: None if there are no more problems.
        num_rollouts: number of rollouts collected: 1 without dynamic sampling, 0 if there were no more problems.
        seconds: seconds per phase, such as "generation" or "weight_sync".
    """

    step: int
    version: int
    rollout: Rollout | None
    num_rollouts: int
    seconds: dict[str, float]


class RolloutPipeline:
    """Produces rollouts up to `max_trajectory_age` steps ahead of the training step.

    All calls to generation, including validation, go through this class, one at a time, except in-flight weight
    updates, which run during a rollout; no other code updates the
    weights of generation. With `max_trajectory_age=0` they run in the caller's thread.

    Example::

        pipeline.request(step=1, version=0, publish=publish_weights)
        step_rollout = pipeline.take()

    Args:
        sleeps: release the GPU memory of generation between rollouts, because the policy trains on the same GPUs.
        offload: `PolicyInterface.offload`, if the policy releases its memory during rollouts.
    """

    def __init__(
        self,
        config: OnPolicyConfig,
        generation: GenerationInterface,
        environment: EnvironmentInterface | EpisodeCollector,
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
        self._published: int | None = None  # latest version of the weights that was published for generation
        self._ahead: deque[Future[StepRollout]] = deque()
        self._last_requested = 0  # steps are counted from 1
        self._thread = ThreadPoolExecutor(1, "rollouts") if config.max_trajectory_age else None

    def request(self, step: int, version: int, publish: Publish, while_grading: WhileGrading | None = None) -> None:
        """Request the rollouts of `step` and of later steps, as far ahead as `max_trajectory_age` allows.

        Steps that compare log-probabilities are not requested ahead: the comparison is valid only with the weights
        that generated the completions.

        Args:
            step: the next training step.
            version: version of the weights to generate with: those after `version` steps.
            publish: publishes these weights. Called in the caller's thread, once per version.
            while_grading: may use the policy while the completions are graded; see `rollouts.collect`. Called in the
                caller's thread, if the rollout runs in it, the batch is the final one, and the policy has its memory.
        """
        next_step = max(step, self._last_requested + 1)
        last_step = min(step + self._config.max_trajectory_age, self._config.max_num_steps)
        while next_step <= last_step and (next_step == step or not self.is_check_step(next_step)):
            update = self._publish_if_new(version, publish)
            if update is not None and self._config.in_flight_weight_updates and self._is_rolling_out():
                self._update_generation(update, Timer(), in_flight=True)
                update = None
            self._ahead.append(self._run(partial(self._roll_out, next_step, version, update, while_grading)))
            self._last_requested = next_step
            next_step += 1

    def is_check_step(self, step: int) -> bool:
        """Return whether this step compares the log-probabilities of generation and policy."""
        return step % self._config.logprob_check.period == 0

    def take(self) -> StepRollout:
        """Wait for the rollout of the next step and return it. Re-raises an exception of the rollout."""
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
        """Roll out validation problems with the weights after `version` steps; return rollout and seconds per phase."""
        update = self._publish_if_new(version, publish)

        def job() -> tuple[Rollout, dict[str, float]]:
            timer = Timer()
            with self._generation_turn(update, timer):
                rollout = self._collect(
                    problems, timer=timer, **validation_options(self._config.seed, num_generations, sampling)
                )
            return rollout, timer.seconds()

        return self._run(job).result()

    def save(self, directory: Path) -> dict[str, Any]:
        """Wait for the rollouts that are ahead, write them into `directory`, and return the state for `load`."""
        ahead = [future.result() for future in self._ahead]
        if ahead:
            torch.save([_to_plain(item) for item in ahead], directory / "rollouts.pt")
        return {"loader": self._loader.state_dict(), "num_rollouts_ahead": len(ahead)}

    def load(self, directory: Path, state: Mapping[str, Any]) -> None:
        """Restore the state that `save` returned and the rollouts that it wrote."""
        self._loader.load_state_dict(state["loader"])
        if state["num_rollouts_ahead"]:
            for plain in torch.load(directory / "rollouts.pt", weights_only=True):
                self._ahead.append(completed(_from_plain(plain)))
            self._last_requested = self._ahead[-1].result().step

    def close(self) -> None:
        """Cancel requested rollouts that have not started."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(self, job: Callable[[], ResultT]) -> Future[ResultT]:
        return completed(job()) if self._thread is None else self._thread.submit(job)

    def _publish_if_new(self, version: int, publish: Publish) -> WeightUpdate | WeightOffer | None:
        if self._published == version:
            return None
        self._published = version
        return publish(version)

    def _roll_out(
        self,
        step: int,
        version: int,
        update: WeightUpdate | WeightOffer | None,
        while_grading: WhileGrading | None,
    ) -> StepRollout:
        timer = Timer()
        problems = self._loader.next_batch(self._config.num_prompts_per_step)
        if problems is None:
            return StepRollout(step, version, None, 0, {})
        with self._generation_turn(update, timer):
            rollout, num_rollouts = self._collect_for_step(problems, step, timer, while_grading)
        return StepRollout(step, version, rollout, num_rollouts, timer.seconds())

    @contextmanager
    def _generation_turn(self, update: WeightUpdate | WeightOffer | None, timer: Timer) -> Iterator[None]:
        """Give the GPUs to generation, with the weights of `update`, during the block. See the module's diagram.

        A generation worker that restarts during the block needs the policy's weights: the policy then reloads them,
        sends them, and offloads them again.
        """
        self._offload_policy(timer, keep_weights=update is not None)
        if update is not None:
            self._wake(timer, ["weights"])
            self._update_generation(update, timer)
            self._offload_policy(timer, keep_weights=False)
        self._wake(timer, ["kv_cache"] if update is not None else None)
        self._asleep = False
        yield
        if self._sleeps:
            with timer.phase("sleep"):
                self._generation.sleep()
            self._asleep = True

    def _offload_policy(self, timer: Timer, *, keep_weights: bool) -> None:
        if self._offload is not None:
            with timer.phase("offload"):
                self._offload(keep_weights=keep_weights)

    def _wake(self, timer: Timer, tags: list[str] | None) -> None:
        if self._asleep:
            with timer.phase("wake"):
                self._generation.wake(tags)

    def _is_rolling_out(self) -> bool:
        return any(not future.done() for future in self._ahead)

    def _update_generation(self, update: WeightUpdate | WeightOffer, timer: Timer, *, in_flight: bool = False) -> None:
        """Load the weights of `update` into generation and compare the digests of both sides."""
        with timer.phase("weight_sync"):
            digest = self._generation.update_weights(update, in_flight=in_flight)
        if digest != update.digest:
            raise WeightSyncError(
                f"version {update.version}: generation reports weight digest {digest}, the policy published "
                f"{update.digest}"
            )

    def _collect(self, problems: BatchedDataDict, **options: Any) -> Rollout:
        return collect_rollout(problems, self._generation, self._environment, **options)

    def _collect_for_step(
        self, problems: BatchedDataDict, step: int, timer: Timer, while_grading: WhileGrading | None
    ) -> tuple[Rollout, int]:
        """Collect the rollout of `problems`; return it and the number of rollouts it took.

        Dynamic sampling replaces groups without a learning signal by groups of further problems (Yu et al. 2025,
        "DAPO", section 3.2).
        """
        config = self._config
        num_samples = problems.size * config.num_generations_per_prompt
        limit = config.max_rollouts_per_step
        with_signal: list[Rollout] = []
        without_signal: list[Rollout] = []
        options: dict[str, Any] = {}
        if while_grading is not None and limit == 1 and self._thread is None and not self._sleeps:
            options["while_grading"] = while_grading
        for attempt in range(limit):
            rollout = self._collect(
                problems,
                num_generations=config.num_generations_per_prompt,
                seed=draw_seed(config.seed, "train", step, attempt),
                timer=timer,
                streaming=config.stream_rollouts,
                **options,
            )
            if config.overlong_filtering:
                rollout.batch["sample_mask"] = rollout.batch["sample_mask"] * ~rollout.truncated
                for record in rollout.episodes or ():
                    if record["end"] != "done":
                        record["outcome"] = "masked"
            if limit == 1:
                return rollout, 1
            signal = group_has_signal(rollout.batch["rewards"], rollout.batch["group"], rollout.batch["sample_mask"])
            with_signal.append(rollouts.select(rollout, signal))
            without_signal.append(rollouts.select(rollout, ~signal))
            if sum(len(r.completions) for r in with_signal) >= num_samples:
                break
            next_problems = self._loader.next_batch(problems.size)
            if next_problems is None:
                break
            problems = next_problems
        parts = [r for r in (*with_signal, *without_signal) if r.completions]
        candidates = rollouts.concatenate(parts, self._pad_token_id)
        for record in (candidates.episodes or [])[num_samples:]:
            record["outcome"] = "replaced: its group has no learning signal, or is not needed"
        return (
            dataclasses.replace(rollouts.select(candidates, torch.arange(num_samples)), episodes=candidates.episodes),
            attempt + 1,
        )


def _to_plain(item: StepRollout) -> dict[str, Any]:
    """Convert to tensors, lists and numbers, which `torch.load` reads with `weights_only=True`."""
    rollout = item.rollout
    plain = {"step": item.step, "version": item.version, "num_rollouts": item.num_rollouts, "seconds": item.seconds}
    if rollout is None:
        return {**plain, "rollout": None}
    fields = {
        name: getattr(rollout, name)
        for name in ("truncated", "prompts", "completions", "metrics", "failed", "episodes")
    }
    branches = None if rollout.branches is None else dict(rollout.branches.get_dict())
    return {**plain, "rollout": {**fields, "batch": dict(rollout.batch.get_dict()), "branches": branches}}


def _from_plain(plain: Mapping[str, Any]) -> StepRollout:
    rollout = plain["rollout"]
    if rollout is not None:
        branches = rollout.get("branches")
        rollout = Rollout(
            **{
                **rollout,
                "batch": BatchedDataDict(rollout["batch"]),
                "branches": None if branches is None else BatchedDataDict(branches),
            }
        )
    return StepRollout(**{**plain, "rollout": rollout})
