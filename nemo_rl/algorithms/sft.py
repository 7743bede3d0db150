"""Supervised fine-tuning: a policy learns to continue conversations as the data does.

A step draws records, and takes the optimizer steps on the tokens in the loss (`NLLLoss`, `nemo_rl.data.supervised`).
The data of a step follow from the seed and the number of records drawn before, so a resumed run repeats the steps of an
uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from nemo_rl.algorithms.loss_functions import NLLLoss
from nemo_rl.algorithms.sft_config import SFTJobConfig
from nemo_rl.algorithms.training_loop import MetricRecorder, TrainingLoop, check_metric_names, checkpoint_remedies
from nemo_rl.observability.timer import Timer

if TYPE_CHECKING:
    from nemo_rl.data.supervised import ConversationLoader
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.models.policy.interfaces import PolicyInterface
    from nemo_rl.utils.checkpoint import Checkpoint, CheckpointStore


def restore_data_position(loader: ConversationLoader, checkpoint: Checkpoint) -> None:
    """Move the loader to the position in a checkpoint. Raises `CheckpointError` if it belongs to other data."""
    with checkpoint_remedies(checkpoint):
        loader.load_state_dict(checkpoint.state().get("loader", {}))


@dataclass
class SFT(TrainingLoop):
    """Runs the training loop of supervised fine-tuning.

    Example::

        sft = SFT(config=config, policy=policy, loader=loader, validation=None, recorder=recorder, checkpoints=None)
        reason = sft.run()

    Attributes:
        validation: validation records as one batch, whose rows can be divided among the workers, or None.
        checkpoints: where checkpoints are written; None writes no checkpoints.
    """

    config: SFTJobConfig
    policy: PolicyInterface
    loader: ConversationLoader
    validation: BatchedDataDict | None
    recorder: MetricRecorder
    checkpoints: CheckpointStore | None
    step: int = 0
    on_first_step: Callable[[], None] = lambda: None
    timer: Timer = field(default_factory=Timer)
    _last_validation: dict[str, float] = field(default_factory=dict)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint instead of from the start. Raises `CheckpointError` if it cannot be loaded."""
        restore_data_position(self.loader, checkpoint)
        with checkpoint_remedies(checkpoint):
            state = checkpoint.state()
            self.policy.load_checkpoint(checkpoint.path / "policy")
        self._last_validation = state["validation"]
        self.step = state["step"]

    def run(self) -> str:
        """Train until a limit is reached; return the reason for the end as a short phrase."""
        config = self.config
        return self.train_until_limit(
            config.sft.validation, save_period=config.checkpointing.save_period, num_epochs=config.sft.max_num_epochs
        )

    def _train_step(self) -> bool:
        """Run one step; return False if there are no more records."""
        self.timer.reset()
        with self.timer.phase("step"):
            with self.timer.phase("data"):
                batch = self.loader.next_batch(self.config.sft.num_records_per_step)
            if batch is None:
                return False
            with self.timer.phase("train"):
                result = self.policy.train(batch, NLLLoss())
        self.step += 1
        timing = self.timer.seconds()
        self.recorder.log_metrics(
            self.step,
            {
                **{f"train/{name}": value for name, value in result.metrics.items()},
                "train/epoch": self.loader.epoch,
                "train/loss_tokens": float(batch["token_mask"].sum()),
                "perf/tokens_per_s": result.num_tokens / timing["step"],
                "perf/samples_per_s": batch.size / timing["step"],
                **{f"timing/{name}_s": seconds for name, seconds in timing.items()},
            },
        )
        return True

    def _validate(self) -> None:
        """Measure the mean loss per token of the validation records."""
        if self.validation is None:
            return
        batch = self.validation
        self.timer.reset()
        with self.timer.phase("validation"):
            logprobs = self.policy.get_logprobs(batch)
            in_loss = (batch["token_mask"] * batch["sample_mask"][:, None]) > 0
            loss = -torch.where(in_loss, logprobs, 0.0).sum(dtype=torch.float64) / in_loss.sum()
        metrics = {"val/loss": float(loss)}
        if not self._last_validation:
            check_metric_names({"checkpointing.metric_name": self.config.checkpointing.metric_name}, metrics)
        self._last_validation = {"step": self.step, **metrics}
        timing = {f"timing/{name}_s": seconds for name, seconds in self.timer.seconds().items()}
        self.recorder.log_metrics(self.step, metrics | timing)

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        state = {"step": self.step, "validation": self._last_validation, "loader": self.loader.state_dict()}
        # A metric ranks only the weights that it was measured on.
        measured = self._last_validation if self._last_validation.get("step") == self.step else {}
        self.checkpoints.save(
            self.step, state, measured, lambda directory: self.policy.save_checkpoint(directory / "policy")
        )

    def _reason_to_stop(self, started: float) -> str | None:
        config = self.config.sft
        if config.max_num_steps is not None and self.step >= config.max_num_steps:
            return f"all {config.max_num_steps} steps are done"
        if config.max_time_s is not None and time.monotonic() - started >= config.max_time_s:
            return f"sft.max_time_s={config.max_time_s:g} is reached"
        return None
