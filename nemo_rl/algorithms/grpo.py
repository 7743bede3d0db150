"""Group relative policy optimisation (Shao et al. 2024, "DeepSeekMath", section 4.1).

::

    problems ──► generation ──completions──► environment ──rewards──► advantages ─┐
                     ▲                                                            ▼
                     └──── weights, digest checked ──── policy ◄──── training batch

One step: draw problems, bring generation up to the policy's weights, complete each problem several times, judge the
completions, compare each reward with its group's, and take the optimizer steps. Everything random in a step follows
from (seed, step), so a resumed run repeats what an undisturbed one would have done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from nemo_rl.algorithms import rollouts
from nemo_rl.algorithms.advantages import compute_advantages, group_has_signal
from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.algorithms.loss_functions import ClippedPGLoss
from nemo_rl.algorithms.rollouts import Rollout, draw_seed
from nemo_rl.errors import LogprobMismatchError, WeightSyncError
from nemo_rl.utils.timer import Timer

if TYPE_CHECKING:
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.environments.interfaces import EnvironmentInterface
    from nemo_rl.models.generation.interfaces import GenerationInterface
    from nemo_rl.models.policy.interfaces import PolicyInterface
    from nemo_rl.utils.checkpoint import Checkpoint, CheckpointStore


class PromptLoader(Protocol):
    """Where problems come from, in an order that depends on nothing but seed and position."""

    def next_batch(self, num_problems: int) -> BatchedDataDict | None:
        """The next problems, or None when the allowed number of epochs is used up."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Recorder(Protocol):
    """Who is told what happened."""

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None: ...

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None: ...


@dataclass
class GRPO:
    """The training loop and the parts that it drives.

    Attributes:
        validation: validation problems as one batch, or None.
        checkpoints: None writes none.
        step: training steps completed so far.
        on_first_step: called once, when the first step of this process is about to begin.
    """

    config: MasterConfig
    policy: PolicyInterface
    generation: GenerationInterface
    environment: EnvironmentInterface
    loader: PromptLoader
    validation: BatchedDataDict | None
    recorder: Recorder
    checkpoints: CheckpointStore | None
    pad_token_id: int
    step: int = 0
    on_first_step: Callable[[], None] = lambda: None
    timer: Timer = field(default_factory=Timer)
    _served_version: int | None = None
    _logprobs_checked: bool = False
    _last_validation: dict[str, float] = field(default_factory=dict)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint instead of from the start."""
        state = checkpoint.state()
        self.policy.load_checkpoint(checkpoint.path / "policy")
        self.loader.load_state_dict(state["loader"])
        self._last_validation = state["validation"]
        self.step = state["step"]

    def run(self) -> str:
        """Train until a limit is reached; returns why the run ended, as a short phrase."""
        config, started = self.config.grpo, time.monotonic()
        if self.step == 0 and config.validation.at_start:
            self._validate()
        self.on_first_step()
        while (reason := self._reason_to_stop(started)) is None:
            problems = self.loader.next_batch(config.num_prompts_per_step)
            if problems is None:
                reason = f"all {config.max_num_epochs} epochs are done"
                break
            self._train_step(problems)
            if config.validation.period and self.step % config.validation.period == 0:
                self._validate()
            if self.step % self.config.checkpointing.save_period == 0:
                self._save()
        unsaved = self.step % self.config.checkpointing.save_period != 0
        if config.validation.at_end and self._last_validation.get("step") != self.step:
            self._validate()
            unsaved = True  # or a life that ends before its mark would validate, and record it, once more
        if unsaved:
            self._save()
        return reason

    def _train_step(self, problems: BatchedDataDict) -> None:
        step = self.step + 1
        self.timer.reset()
        with self.timer.phase("step"):
            self._sync_weights()
            rollout, num_rollouts = self._collect(problems, step)
            batch = rollout.batch
            batch["advantages"] = compute_advantages(
                batch["rewards"], batch["group"], self.config.grpo.advantage, batch["sample_mask"]
            )
            error = self._add_logprobs(batch, step)
            with self.timer.phase("train"):
                result = self._train(batch)
        self.step = step
        metrics = {f"train/{name}": value for name, value in (result | error | _describe(rollout)).items()}
        metrics["train/num_rollouts"] = num_rollouts
        timing = self.timer.seconds()
        metrics["perf/tokens_per_s"] = float(rollout.num_completion_tokens.sum()) / timing["step"]
        metrics["perf/samples_per_s"] = len(rollout.completions) / timing["step"]
        self.recorder.log_metrics(step, metrics | {f"timing/{name}_s": seconds for name, seconds in timing.items()})

    def _collect(self, problems: BatchedDataDict, step: int) -> tuple[Rollout, int]:
        """Roll out `problems`. With dynamic sampling, groups without signal are replaced by those of further problems
        (Yu et al. 2025, "DAPO", section 3.2); returns the rollout and how many it took."""
        config = self.config.grpo
        wanted = problems.size * config.num_generations_per_prompt
        limit = config.dynamic_sampling.max_generation_batches if config.dynamic_sampling.enabled else 1
        useful: list[Rollout] = []
        useless: list[Rollout] = []
        for attempt in range(limit):
            rollout = rollouts.collect(
                problems,
                self.generation,
                self.environment,
                num_generations=config.num_generations_per_prompt,
                seed=draw_seed(config.seed, "train", step, attempt),
                timer=self.timer,
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
            following = self.loader.next_batch(problems.size)
            if following is None:
                break
            problems = following
        whole = rollouts.concatenate([r for r in (*useful, *useless) if r.completions], self.pad_token_id)
        return rollouts.select(whole, torch.arange(wanted)), attempt + 1

    def _add_logprobs(self, batch: BatchedDataDict, step: int) -> dict[str, float]:
        """Add the policy's log-probabilities where the loss needs them, and check the generator's against them.

        With a single optimizer step per rollout the policy before the step is the policy that is being trained: the
        loss then takes its own log-probabilities for the old ones, which saves a forward pass.
        """
        config = self.config
        check = not self._logprobs_checked or step % config.grpo.logprob_check.period == 0
        several = (
            config.grpo.num_updates_per_step > 1 or (config.policy.train_global_batch_size or batch.size) < batch.size
        )
        error = {}
        with self.timer.phase("logprobs"):
            if check or several:
                logprobs = self.policy.get_logprobs(batch)
                if several:
                    batch["prev_logprobs"] = logprobs
            if config.loss.kl_coef > 0:
                batch["reference_policy_logprobs"] = self.policy.get_reference_policy_logprobs(batch)
        if check:
            error["logprob_error"] = self._check_logprobs(batch, logprobs, step)
            self._logprobs_checked = True
        return error

    def _check_logprobs(self, batch: BatchedDataDict, logprobs: torch.Tensor, step: int) -> float:
        mask = batch["token_mask"]
        difference = (logprobs - batch["generation_logprobs"]).abs() * mask
        mean, largest = float(difference.sum() / mask.sum().clamp(min=1)), float(difference.max())
        bound = self.config.grpo.logprob_check.max_mean_error
        if not mean <= bound:
            raise LogprobMismatchError(
                f"step {step}: the log-probabilities of generation and policy differ by {mean:.4g} nats per token on "
                f"average (largest {largest:.4g}), more than grpo.logprob_check.max_mean_error={bound}. The two do not "
                "compute the same model: check precision, attention kernels and the weight sync before raising it"
            )
        return mean

    def _train(self, batch: BatchedDataDict) -> dict[str, float]:
        loss_fn = ClippedPGLoss(self.config.loss)
        updates = self.config.grpo.num_updates_per_step
        results = [self.policy.train(batch, loss_fn).metrics for _ in range(updates)]
        return {name: sum(result[name] for result in results) / updates for name in results[0]}

    def _sync_weights(self) -> None:
        """Bring generation to the weights after `self.step` steps; both sides must report the same digest."""
        if self._served_version == self.step:
            return
        with self.timer.phase("weight_sync"):
            precision = self.config.policy.generation.precision or self.config.policy.precision
            update = self.policy.publish_weights(self.step, precision)
            digest = self.generation.update_weights(update)
        if digest != update.digest:
            raise WeightSyncError(
                f"version {self.step}: generation reports weight digest {digest}, the policy published {update.digest}"
            )
        self._served_version = self.step

    def _validate(self) -> None:
        if self.validation is None:
            return
        config = self.config
        count, sampling = config.grpo.validation.num_generations, config.policy.generation.validation
        self.timer.reset()
        with self.timer.phase("validation"):
            self._sync_weights()
            rollout = rollouts.collect(
                self.validation,
                self.generation,
                self.environment,
                num_generations=count,
                seed=draw_seed(config.grpo.seed, "validation"),
                timer=self.timer,
                greedy=count == 1 and sampling is None,
                sampling=sampling,
            )
        metrics = {f"val/{name}": value for name, value in _describe_validation(rollout, count).items()}
        self._last_validation = {"step": self.step, **metrics}
        timing = {f"timing/{name}_s": seconds for name, seconds in self.timer.seconds().items()}
        self.recorder.log_metrics(self.step, metrics | timing)
        self.recorder.log_samples(self.step, _samples(rollout, self.config.logger.num_samples))

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        state = {"step": self.step, "loader": self.loader.state_dict(), "validation": self._last_validation}
        # A metric ranks the weights it was measured on, not those of a later step.
        measured = self._last_validation if self._last_validation.get("step") == self.step else {}
        self.checkpoints.save(
            self.step, state, measured, lambda directory: self.policy.save_checkpoint(directory / "policy")
        )

    def _reason_to_stop(self, started: float) -> str | None:
        config, early = self.config.grpo, self.config.grpo.early_stop
        if self.step >= config.max_num_steps:
            return f"all {config.max_num_steps} steps are done"
        if config.max_time_s is not None and time.monotonic() - started >= config.max_time_s:
            return f"grpo.max_time_s={config.max_time_s:g} is over"
        if early is not None and self._last_validation.get(early.metric, -math.inf) >= early.threshold:
            return f"{early.metric} reached {self._last_validation[early.metric]:.3f}"
        return None


def _describe(rollout: Rollout) -> dict[str, float]:
    rewards, lengths = rollout.batch["rewards"], rollout.num_completion_tokens
    signal = group_has_signal(rewards, rollout.batch["group"], rollout.batch["sample_mask"])
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(correction=0)),
        "groups_with_signal": float(signal.float().mean()),
        "completion_length": float(lengths.mean()),
        "truncated": float(rollout.truncated.float().mean()),
        **{f"env_{name}": value for name, value in rollout.metrics.items()},
    }


def _describe_validation(rollout: Rollout, num_generations: int) -> dict[str, float]:
    correct = (rollout.batch["rewards"] > 0).view(-1, num_generations).sum(dim=1).tolist()
    metrics = {
        "accuracy": sum(correct) / (len(correct) * num_generations),
        "reward": float(rollout.batch["rewards"].mean()),
        "completion_length": float(rollout.num_completion_tokens.mean()),
        "truncated": float(rollout.truncated.float().mean()),
        **{f"env_{name}": value for name, value in rollout.metrics.items()},
    }
    k = 1
    while num_generations > 1 and k <= num_generations:
        metrics[f"pass@{k}"] = sum(rollouts.pass_at_k(num_generations, int(c), k) for c in correct) / len(correct)
        k *= 2
    return metrics


def _samples(rollout: Rollout, count: int) -> list[dict[str, Any]]:
    rewards = rollout.batch["rewards"].tolist()
    return [
        {"prompt": rollout.prompts[i], "completion": rollout.completions[i], "reward": rewards[i]}
        for i in range(min(count, len(rewards)))
    ]
