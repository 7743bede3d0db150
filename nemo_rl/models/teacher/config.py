"""The `teacher` section of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from nemo_rl.distributed.config import BundlesConfig
from nemo_rl.models.backends import teacher_backend
from nemo_rl.models.generation.config import GenerationConfig
from nemo_rl.models.policy.config import EMBEDDED_MODEL, BatchingConfig, EmbeddedModelConfig, PolicyConfig
from nemo_rl.utils.config import ConfigModel


class TeacherConfig(ConfigModel):
    """The frozen model that a student learns from, and its workers."""

    model_name: str = Field(
        EMBEDDED_MODEL,
        description="Hugging Face directory or hub name, an embedded model, a checkpoint, or the directory of a run, "
        "which stands for its best checkpoint.",
    )
    tokenizer_name: str | None = Field(None, description="Hugging Face directory or hub name. Null: model_name.")
    embedded: EmbeddedModelConfig = Field(default_factory=EmbeddedModelConfig)
    backend: str = Field("torch", description="A name in nemo_rl.models.backends.TEACHER_BACKENDS.")
    py_executable: str | None = Field(None, description="Python of the workers. Null: the registered one.")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="Compute dtype.")
    sharding: Literal["ddp", "fsdp"] = Field(
        "ddp", description="Replicate the model on every worker, or shard it (FSDP2)."
    )
    num_threads: int | None = Field(
        None, ge=1, description="Torch threads of one worker on CPUs. Null: an equal share of the node's CPUs."
    )
    attn_implementation: str = Field(
        "sdpa", description="Attention kernel of transformers: sdpa, eager, flash_attention_2."
    )
    logprob_batch_size: int = Field(256, ge=1, description="Samples per forward pass.")
    batching: BatchingConfig = Field(default_factory=BatchingConfig)
    cluster: BundlesConfig | None = Field(
        None, description="Bundles of the teacher. Null: the teacher shares the bundles of the policy."
    )

    @field_validator("backend")
    @classmethod
    def _known_backend(cls, value: str) -> str:
        teacher_backend(value)
        return value

    def as_policy(self, student: PolicyConfig) -> PolicyConfig:
        """Return the teacher as a section `policy`, with the sequence length and the temperature of its student."""
        return PolicyConfig(
            model_name=self.model_name,
            tokenizer_name=self.tokenizer_name,
            embedded=self.embedded,
            precision=self.precision,
            sharding=self.sharding,
            num_threads=self.num_threads,
            attn_implementation=self.attn_implementation,
            max_sequence_length=student.max_sequence_length,
            logprob_batch_size=self.logprob_batch_size,
            batching=self.batching,
            generation=GenerationConfig(temperature=student.generation.temperature),
        )
