"""The training loop over records that supervised fine-tuning, DPO and reward models share.

A step draws records and takes the optimizer steps on them. The data of a step follow from the seed and the number of
records drawn before, so a resumed run repeats the steps of an uninterrupted one.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from nemo_rl.algorithms.record_config import RecordJobConfig
from nemo_rl.algorithms.training_loop import MetricRecorder, TrainingLoop, check_metric_names, checkpoint_remedies
from nemo_rl.observability.timer import Timer

if TYPE_CHECKING:
    from nemo_rl.data.problem import Role
    from nemo_rl.data.tokenized_examples import ExampleLoader
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.models.policy.interfaces import LossFunction, PolicyInterface
    from nemo_rl.utils.checkpoint import Checkpoint, CheckpointStore

ConfigT = TypeVar("ConfigT", bound=RecordJobConfig)


def restore_data_position(loader: ExampleLoader[Any], checkpoint: Checkpoint) -> None:
    """Move the loader to the position in a checkpoint. Raises `CheckpointError` if it belongs to other data."""
    with checkpoint_remedies(checkpoint):
        loader.load_state_dict(checkpoint.state().get("loader", {}))


@dataclass
class RecordTraining(TrainingLoop, Generic[ConfigT]):
    """Runs a training loop over records. A subclass is one algorithm: it says which loss is minimized.

    Attributes:
        validation: validation records as one batch, whose rows can be divided among the workers, or None.
        checkpoints: where checkpoints are written; None writes no checkpoints.
    """

    config: ConfigT
    policy: PolicyInterface
    loader: ExampleLoader[Any]
    validation: BatchedDataDict | None
    recorder: MetricRecorder
    checkpoints: CheckpointStore | None
    step: int = 0
    on_first_step: Callable[[], None] = lambda: None
    timer: Timer = field(default_factory=Timer)
    _last_validation: dict[str, float] = field(default_factory=dict)

    @abstractmethod
    def _loss(self) -> LossFunction:
        """Return the loss."""

    def _prepare(self, batch: BatchedDataDict, role: Role) -> BatchedDataDict:
        """Return a batch of training or validation records with what else the loss needs."""
        return batch

    def _outputs(self, batch: BatchedDataDict) -> torch.Tensor:
        """Return what the loss takes of the policy, without gradient."""
        return self.policy.get_logprobs(batch)

    def _batch_metrics(self, batch: BatchedDataDict) -> dict[str, float]:
        """Return metrics of a batch itself."""
        return {"train/loss_tokens": float(batch["token_mask"].sum())}

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
        training = self.config.training
        return self.train_until_limit(
            training.validation,
            save_period=self.config.checkpointing.save_period,
            num_epochs=training.max_num_epochs,
        )

    def _train_step(self) -> bool:
        """Run one step; return False if there are no more records."""
        self.timer.reset()
        with self.timer.phase("step"):
            with self.timer.phase("data"):
                batch = self.loader.next_batch(self.config.training.num_records_per_step)
            if batch is None:
                return False
            with self.timer.phase("train"):
                result = self.policy.train(self._prepare(batch, "train"), self._loss())
        self.step += 1
        timing = self.timer.seconds()
        self.recorder.log_metrics(
            self.step,
            {
                **{f"train/{name}": value for name, value in result.metrics.items()},
                "train/epoch": self.loader.epoch,
                **self._batch_metrics(batch),
                "perf/tokens_per_s": result.num_tokens / timing["step"],
                "perf/samples_per_s": batch.size / timing["step"],
                **{f"timing/{name}_s": seconds for name, seconds in timing.items()},
            },
        )
        return True

    def _validate(self) -> None:
        """Measure loss and metrics on the validation records, as on one batch."""
        if self.validation is None:
            return
        self.timer.reset()
        with self.timer.phase("validation"):
            batch = self._prepare(self.validation, "validation")
            counted = batch["token_mask"][:, 1:] * batch["sample_mask"][:, None]
            loss, others = self._loss()(
                self._outputs(batch).double(), batch, counted.sum(dtype=torch.float64), batch["sample_mask"].sum()
            )
        metrics = {f"val/{name}": float(value) for name, value in {"loss": loss, **others}.items()}
        if not self._last_validation:
            check_metric_names({"checkpointing.metric_name": self.config.checkpointing.metric_name}, metrics)
        self._last_validation = {"step": self.step, **metrics}
        timing = {f"timing/{name}_s": seconds for name, seconds in self.timer.seconds().items()}
        self.recorder.log_metrics(self.step, metrics | timing)

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the loop, as JSON data."""
        return {"step": self.step, "validation": self._last_validation, "loader": self.loader.state_dict()}

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        # A metric ranks only the weights that it was measured on.
        measured = self._last_validation if self._last_validation.get("step") == self.step else {}
        self.checkpoints.save(
            self.step, self._state(), measured, lambda directory: self.policy.save_checkpoint(directory / "policy")
        )

    def _reason_to_stop(self, started: float) -> str | None:
        training = self.config.training
        if training.max_num_steps is not None and self.step >= training.max_num_steps:
            return f"all {training.max_num_steps} steps are done"
        if training.max_time_s is not None and time.monotonic() - started >= training.max_time_s:
            return f"{self.config.section}.max_time_s={training.max_time_s:g} is reached"
        return None
