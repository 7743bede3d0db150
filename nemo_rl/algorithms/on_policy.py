"""The training loop over a policy's own samples, which GRPO and distillation share.

::

    problems ──► generation ──completions──► environment ──rewards──► signal ─────┐
                     ▲                                                            ▼
                     └──── weights, digest checked ──── policy ◄──── training batch

A step draws problems, syncs the policy's weights to generation, generates completions, grades them, and takes the
optimizer steps on the signal that a subclass adds. All random numbers of a step follow from (seed, step), so a resumed
run repeats the steps of an uninterrupted run. `rollout_pipeline` implements the upper row; with `max_trajectory_age` it
produces rollouts while the policy trains.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from nemo_rl.algorithms import rollouts
from nemo_rl.algorithms.advantages import group_has_signal
from nemo_rl.algorithms.branches import TrainingRows, training_rows
from nemo_rl.algorithms.config import OnPolicyJobConfig
from nemo_rl.algorithms.rollout_pipeline import PromptLoader, RolloutPipeline
from nemo_rl.algorithms.rollout_records import rollout_records
from nemo_rl.algorithms.rollouts import Rollout
from nemo_rl.algorithms.training_loop import MetricRecorder, TrainingLoop, check_metric_names, checkpoint_remedies
from nemo_rl.errors import LogprobMismatchError
from nemo_rl.observability.timer import Timer

if TYPE_CHECKING:
    from nemo_rl.algorithms.episodes import EpisodeCollector
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.environments.interfaces import EnvironmentInterface
    from nemo_rl.models.generation.interfaces import GenerationInterface
    from nemo_rl.models.policy.interfaces import LossFunction, PolicyInterface
    from nemo_rl.models.weights.interfaces import WeightOffer, WeightUpdate
    from nemo_rl.utils.checkpoint import Checkpoint, CheckpointStore


class Recorder(MetricRecorder, Protocol):
    """Receives the metrics and samples of a run."""

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None: ...

    def log_episodes(self, step: int, episodes: list[dict[str, Any]]) -> None: ...

    def log_rollouts(self, step: int, samples: list[dict[str, Any]]) -> None: ...


def restore_data_position(loader: PromptLoader, checkpoint: Checkpoint) -> None:
    """Move the loader to the position in a checkpoint. Raises `CheckpointError` if it belongs to other data."""
    with checkpoint_remedies(checkpoint):
        loader.load_state_dict(checkpoint.state()["rollouts"]["loader"])


@dataclass
class OnPolicyLoop(TrainingLoop):
    """Trains a policy on its own samples. A subclass says what it learns from them.

    Attributes:
        validation: validation problems as one batch, or None.
        checkpoints: where checkpoints are written; None writes no checkpoints.
    """

    config: OnPolicyJobConfig
    policy: PolicyInterface
    generation: GenerationInterface
    environment: EnvironmentInterface | EpisodeCollector
    loader: PromptLoader
    validation: BatchedDataDict | None
    recorder: Recorder
    checkpoints: CheckpointStore | None
    pad_token_id: int
    step: int = 0
    on_first_step: Callable[[], None] = lambda: None
    timer: Timer = field(default_factory=Timer)
    _logprobs_checked: bool = False
    _early_logprobs: dict[str, torch.Tensor] | None = None
    _last_validation: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shares_gpus = self.config.shares_gpus
        offloads = self.config.policy.offloads(shares_gpus=shares_gpus)
        self._pipeline = RolloutPipeline(
            self.config.algorithm,
            self.generation,
            self.environment,
            self.loader,
            self.pad_token_id,
            sleeps=shares_gpus,
            offload=self.policy.offload if offloads else None,
        )

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint instead of from the start.

        Raises:
            CheckpointError: the checkpoint cannot be loaded.
        """
        with checkpoint_remedies(checkpoint):
            state = checkpoint.state()
            self.policy.load_checkpoint(checkpoint.path / "policy")
            self._pipeline.load(checkpoint.path, state["rollouts"])
        self._last_validation = state["validation"]
        self.step = state["step"]

    def run(self) -> str:
        """Train until a limit is reached; return the reason for the end as a short phrase."""
        config = self.config
        try:
            return self.train_until_limit(
                config.algorithm.validation,
                save_period=config.checkpointing.save_period,
                num_epochs=config.algorithm.max_num_epochs,
            )
        finally:
            self._pipeline.close()

    def _train_step(self) -> bool:
        """Run one step; return False if there are no more problems."""
        step = self.step + 1
        self.timer.reset()
        with self.timer.phase("step"):
            self._pipeline.request(step, self.step, self._publish_weights, lambda batch: self._score_early(step, batch))
            with self.timer.phase("rollout"):
                step_rollout = self._pipeline.take()
            if step_rollout.rollout is None:
                return False
            rollout = step_rollout.rollout
            rows = training_rows(
                rollout,
                num_parts=self._num_parts(rollout.batch),
                multiple_of=self.policy.data_parallel_size,
                pad_token_id=self.pad_token_id,
            )
            age = self.step - step_rollout.version
            logprob_metrics = self._add_logprobs(rows, step, age)
            self._add_signal(rollout, rows)
            with self.timer.phase("train"):
                result = self._train(rows)
        self.step = step
        metrics = {
            f"train/{name}": value for name, value in (result | logprob_metrics | _rollout_metrics(rollout)).items()
        }
        if rollout.episodes is not None:
            self.recorder.log_episodes(step, rollout.episodes)
        if self.config.logger.max_rollouts_mb:
            records = rollout_records(
                rollout, rows, weights_version=step_rollout.version, environment=self.config.env.name
            )
            self.recorder.log_rollouts(step, records)
        metrics |= {"train/num_rollouts": step_rollout.num_rollouts, "train/trajectory_age": age}
        timing = self._timing(step_rollout.seconds)
        metrics["perf/tokens_per_s"] = float(rollout.num_completion_tokens.sum()) / timing["step"]
        metrics["perf/samples_per_s"] = len(rollout.completions) / timing["step"]
        self.recorder.log_metrics(step, metrics | {f"timing/{name}_s": seconds for name, seconds in timing.items()})
        return True

    def _needs_prev_logprobs(self, num_parts: int) -> bool:
        """Return whether the loss needs the log-probabilities under the policy before the step.

        Args:
            num_parts: number of optimizer steps that divide a rollout.
        """
        has_several_updates = self.config.algorithm.num_updates_per_step > 1 or num_parts > 1
        return has_several_updates or self.config.loss.has_kl_in_reward

    @abstractmethod
    def _add_signal(self, rollout: Rollout, rows: TrainingRows) -> None:
        """Add to the training batch what the policy learns from, such as `advantages`."""

    @abstractmethod
    def _loss_function(self) -> LossFunction:
        """Return the loss of the training batch."""

    def _num_parts(self, samples: BatchedDataDict) -> int:
        """Return the number of optimizer steps that divide a rollout of these samples."""
        return samples.size // (self.config.policy.train_global_batch_size or samples.size)

    def _timing(self, rollout_seconds: dict[str, float]) -> dict[str, float]:
        """Return seconds per phase. Asynchronous rollouts are reported apart; the step includes only the wait."""
        seconds = self.timer.seconds()
        wait = seconds.pop("rollout")
        if self.config.algorithm.max_trajectory_age == 0:
            for name, value in rollout_seconds.items():
                seconds[name] = seconds.get(name, 0.0) + value
            return seconds
        return {**seconds, "wait_for_rollout": wait, **{f"rollout/{name}": s for name, s in rollout_seconds.items()}}

    def _publish_weights(self, version: int) -> WeightUpdate | WeightOffer:
        with self.timer.phase("weight_sync"):
            precision = self.config.policy.generation.precision or self.config.policy.precision
            lasting = self.config.algorithm.max_trajectory_age > 0  # they are loaded while the policy trains
            return self.policy.offer_weights(version, precision, lasting=lasting)

    def _score_early(self, step: int, samples: BatchedDataDict) -> None:
        """Compute what `_add_logprobs` adds while the samples are graded: it does not depend on their rewards."""
        self._early_logprobs = self._compute_logprobs(samples, step, 0, self._num_parts(samples))

    def _add_logprobs(self, rows: TrainingRows, step: int, age: int) -> dict[str, float]:
        """Add the policy's log-probabilities if the loss needs them; at check steps, compare them with generation's.

        With a single optimizer step per rollout, the policy before the step is the policy being trained. The loss then
        uses its own log-probabilities as the old ones, which saves a forward pass.
        """
        config, batch = self.config, rows.batch
        if not config.policy.generation.truncates:
            batch.pop("sampling_logprobs", None)  # equal to generation_logprobs
        computed, self._early_logprobs = self._early_logprobs, None
        if computed is None:
            computed = self._compute_logprobs(batch, step, age, rows.num_parts)
        if self._needs_prev_logprobs(rows.num_parts):
            batch["prev_logprobs"] = computed["logprobs"]
        if config.loss.kl_coef > 0:
            batch["reference_policy_logprobs"] = computed["reference_policy_logprobs"]
        if not self._is_check(step, age):
            return {}
        self._logprobs_checked = True
        return {"logprob_error": self._check_logprobs(batch, computed["logprobs"], step)}

    def _is_check(self, step: int, age: int) -> bool:
        # The comparison is valid only with the weights that generated the completions.
        return age == 0 and (not self._logprobs_checked or self._pipeline.is_check_step(step))

    def _compute_logprobs(self, batch: BatchedDataDict, step: int, age: int, num_parts: int) -> dict[str, torch.Tensor]:
        """Return "logprobs" and "reference_policy_logprobs", [R, T] each, those that are needed."""
        with self.timer.phase("logprobs"):
            inputs = batch.copy()
            inputs["logprob_mask"] = batch["token_mask"]  # the loss and the check use no others
            computed = {}
            has_reference = self.config.loss.kl_coef > 0
            is_reference = has_reference and self.step == 0  # the policy has its initial weights
            if is_reference or self._is_check(step, age) or self._needs_prev_logprobs(num_parts):
                computed["logprobs"] = self.policy.get_logprobs(inputs)
            if is_reference:
                computed["reference_policy_logprobs"] = computed["logprobs"]
            elif has_reference:
                computed["reference_policy_logprobs"] = self.policy.get_reference_policy_logprobs(inputs)
        return computed

    def _check_logprobs(self, batch: BatchedDataDict, logprobs: torch.Tensor, step: int) -> float:
        mask = batch["token_mask"]
        difference = (logprobs - batch["generation_logprobs"]).abs() * mask
        mean, largest = float(difference.sum() / mask.sum().clamp(min=1)), float(difference.max())
        bound = self.config.algorithm.logprob_check.max_mean_error
        if not mean <= bound:
            raise LogprobMismatchError(
                f"step {step}: the log-probabilities of generation and policy differ by {mean:.4g} nats per token on "
                f"average (maximum {largest:.4g}), more than {self.config.algorithm_key}.logprob_check.max_mean_error="
                f"{bound}. They do not compute the same model: check precision, attention kernels and weight sync "
                "before raising the bound"
            )
        return mean

    def _train(self, rows: TrainingRows) -> dict[str, float]:
        loss_fn, updates = self._loss_function(), self.config.algorithm.num_updates_per_step
        batch_size = rows.batch.size // rows.num_parts
        results = [self.policy.train(rows.batch, loss_fn, batch_size=batch_size).metrics for _ in range(updates)]
        return {name: sum(result[name] for result in results) / updates for name in results[0]}

    def _validate(self) -> None:
        if self.validation is None:
            return
        count = self.config.algorithm.validation.num_generations
        self.timer.reset()
        with self.timer.phase("validation"):
            rollout, seconds = self._pipeline.validate(
                self.validation,
                self.step,
                self._publish_weights,
                num_generations=count,
                sampling=self.config.policy.generation.validation,
            )
        metrics = {f"val/{name}": value for name, value in _validation_metrics(rollout, count).items()}
        if not self._last_validation:
            self._check_metric_names(metrics)
        self._last_validation = {"step": self.step, **metrics}
        timing = {f"timing/{name}_s": value for name, value in (self.timer.seconds() | seconds).items()}
        self.recorder.log_metrics(self.step, metrics | timing)
        self.recorder.log_samples(self.step, _samples(rollout, self.config.logger.num_samples))

    def _check_metric_names(self, measured: dict[str, float]) -> None:
        """Raise `ConfigError` if a configured metric is not a validation metric."""
        named = {"checkpointing.metric_name": self.config.checkpointing.metric_name}
        if (early_stop := self.config.algorithm.early_stop) is not None:
            named[f"{self.config.algorithm_key}.early_stop.metric"] = early_stop.metric
        check_metric_names(named, measured)

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        state = {"step": self.step, "validation": self._last_validation}
        # A metric ranks only the weights that it was measured on.
        measured = self._last_validation if self._last_validation.get("step") == self.step else {}

        def write(directory: Path) -> None:
            state["rollouts"] = self._pipeline.save(directory)
            self.policy.save_checkpoint(directory / "policy")

        self.checkpoints.save(self.step, state, measured, write)

    def _reason_to_stop(self, started: float) -> str | None:
        config, early = self.config.algorithm, self.config.algorithm.early_stop
        if self.step >= config.max_num_steps:
            return f"all {config.max_num_steps} steps are done"
        if config.max_time_s is not None and time.monotonic() - started >= config.max_time_s:
            return f"{self.config.algorithm_key}.max_time_s={config.max_time_s:g} is reached"
        if early is not None and self._last_validation.get(early.metric, -math.inf) >= early.threshold:
            return f"{early.metric} reached {self._last_validation[early.metric]:.3f}"
        return None


def _rollout_metrics(rollout: Rollout) -> dict[str, float]:
    rewards, lengths = rollout.batch["rewards"][rollout.scored], rollout.num_completion_tokens
    signal = group_has_signal(rollout.batch["rewards"], rollout.batch["group"], rollout.batch["sample_mask"])
    return {
        "reward": float(rewards.mean()) if len(rewards) else 0.0,
        "reward_std": float(rewards.std(correction=0)) if len(rewards) else 0.0,
        "groups_with_signal": float(signal.float().mean()),
        "completion_length": float(lengths.mean()),
        "truncated": float(rollout.truncated.float().mean()),
        **{f"env_{name}": value for name, value in rollout.metrics.items()},
    }


def _validation_metrics(rollout: Rollout, num_generations: int) -> dict[str, float]:
    """Compute the metrics of a validation. Samples that could not be scored are left out; pass@k needs k others."""
    scored = rollout.scored
    rewards = rollout.batch["rewards"][scored]
    per_problem = (-1, num_generations)
    correct = ((rollout.batch["rewards"] > 0) & scored).view(per_problem).sum(dim=1).tolist()
    counts = scored.view(per_problem).sum(dim=1).tolist()
    metrics = {
        "accuracy": sum(correct) / max(sum(counts), 1),
        "reward": float(rewards.mean()) if len(rewards) else 0.0,
        "completion_length": float(rollout.num_completion_tokens.mean()),
        "truncated": float(rollout.truncated.float().mean()),
        **{f"env_{name}": value for name, value in rollout.metrics.items()},
    }
    k = 1
    while num_generations > 1 and k <= num_generations:
        estimates = [rollouts.pass_at_k(n, c, k) for n, c in zip(counts, correct, strict=True) if n >= k]
        if estimates:
            metrics[f"pass@{k}"] = sum(estimates) / len(estimates)
        k *= 2
    return metrics


def _samples(rollout: Rollout, count: int) -> list[dict[str, Any]]:
    """Return the first `count` samples of each environment."""
    samples: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for i, reward in enumerate(rollout.rewards.tolist()):
        sample = {"prompt": rollout.prompts[i], "completion": rollout.completions[i], "reward": reward}
        if rollout.episodes is not None:
            episode = rollout.episodes[i]
            sample |= {name: episode[name] for name in ("environment", "messages", "end", "outcome", "failure")}
        environment = sample.get("environment", "")
        counts[environment] += 1
        if counts[environment] <= count:
            samples.append(sample)
    return samples
