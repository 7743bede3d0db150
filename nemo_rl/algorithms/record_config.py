"""What the configurations of all jobs that train on records share, such as supervised fine-tuning and DPO."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from nemo_rl.algorithms.batch_sizes import check_batch_sizes, num_shards
from nemo_rl.models.generation.config import GenerationConfig
from nemo_rl.models.policy.config import EMBEDDED_CHAT_MODEL, PolicyConfig
from nemo_rl.utils.checkpoint import CheckpointingConfig
from nemo_rl.utils.config import ConfigModel

if TYPE_CHECKING:
    from nemo_rl.data.config import PreferenceDataConfig, SFTDataConfig
    from nemo_rl.distributed.config import ClusterConfig
    from nemo_rl.observability.logger_config import LoggerConfig


class RecordValidationConfig(ConfigModel):
    """Configures when the loss on the validation data is measured."""

    period: int = Field(
        10, ge=0, description="Validate every N steps. 0 validates only at start and end, as configured."
    )
    at_start: bool = Field(True, description="Validate before the first step.")
    at_end: bool = Field(True, description="Validate after the last step.")
    max_num_records: int = Field(256, ge=1, description="Number of validation records.")


class RecordTrainingConfig(ConfigModel):
    """Configures steps and epochs of training on records. A subclass adds the keys of its algorithm."""

    seed: int = Field(42, ge=0, description="Seed of all random numbers of the run.")
    max_num_steps: int | None = Field(None, ge=1, description="Training steps. Null: all of max_num_epochs.")
    max_num_epochs: int | None = Field(
        1, ge=1, description="Stop after this many passes over the training data. Null: after max_num_steps."
    )
    max_time_s: float | None = Field(None, gt=0, description="Stop after this many seconds of training.")
    num_records_per_step: int = Field(32, ge=1, description="Records per step.")
    validation: RecordValidationConfig = Field(default_factory=RecordValidationConfig)

    @model_validator(mode="after")
    def _check_limits(self) -> RecordTrainingConfig:
        if self.max_num_steps is None and self.max_num_epochs is None:
            raise ValueError("max_num_steps and max_num_epochs are both null; set one of them")
        return self


class RecordPolicyConfig(PolicyConfig):
    """The model to train, its optimizer and its workers. Only an evaluation in the background generates."""

    model_name: str = Field(
        EMBEDDED_CHAT_MODEL, description="Hugging Face directory or hub name, `embedded`, or `embedded-chat`."
    )


class RecordCheckpointingConfig(CheckpointingConfig):
    """Configures when checkpoints are written and which are kept."""

    metric_name: str = Field("val/loss", description="Metric by which checkpoints are ranked.")
    higher_is_better: bool = Field(False, description="Whether higher values of the metric are better.")


class RecordJobConfig(ConfigModel):
    """Base class of the root configurations. A subclass has the sections below and that of its algorithm.

    Attributes:
        section: name of the algorithm's section, a `RecordTrainingConfig`.
        rows_per_record: rows of a batch that one record becomes. They stay in one micro-batch.
        activity: what the job does, for messages.
    """

    section: ClassVar[str]
    rows_per_record: ClassVar[int] = 1
    activity: ClassVar[str]

    if TYPE_CHECKING:
        policy: PolicyConfig
        data: SFTDataConfig | PreferenceDataConfig
        cluster: ClusterConfig
        logger: LoggerConfig
        checkpointing: RecordCheckpointingConfig

    @property
    def training(self) -> RecordTrainingConfig:
        """The section of the algorithm."""
        section: RecordTrainingConfig = getattr(self, self.section)
        return section

    @property
    def num_samples_per_step(self) -> int:
        """Number of rows in one training step."""
        return self.rows_per_record * self.training.num_records_per_step

    @property
    def trained_policy(self) -> PolicyConfig:
        """The section `policy` with the defaults of generation, whose temperature would otherwise divide the logits."""
        return self.policy.model_copy(update={"generation": GenerationConfig()})

    @property
    def num_shards(self) -> int:
        """Number of data-parallel workers."""
        return num_shards(self.policy, self.cluster.num_workers)

    def num_optimizer_steps(self, num_steps: int) -> int:
        """Return the number of optimizer steps of `num_steps` training steps."""
        per_update = self.policy.train_global_batch_size or self.num_samples_per_step
        return num_steps * (self.num_samples_per_step // per_update)

    @model_validator(mode="after")
    def _check_sizes(self) -> RecordJobConfig:
        if self.cluster.generation is not None:
            raise ValueError(f"cluster.generation has no use in {self.activity}, which generates nothing; remove it")
        key = f"{self.section}.num_records_per_step"
        check_batch_sizes(
            self.policy,
            self.num_samples_per_step,
            self.cluster.num_workers,
            key=key if self.rows_per_record == 1 else f"{key} x {self.rows_per_record}",
            rows_per_group=self.rows_per_record,
        )
        return self
