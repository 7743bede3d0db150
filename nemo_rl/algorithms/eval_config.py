"""Root of the configuration of an evaluation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from nemo_rl.algorithms.batch_sizes import check_sample_length
from nemo_rl.data.config import DataConfig
from nemo_rl.distributed.config import BundlesConfig
from nemo_rl.environments.config import EnvironmentConfig
from nemo_rl.models.generation.config import GenerationConfig
from nemo_rl.models.policy.config import EmbeddedModelConfig, PolicyConfig
from nemo_rl.utils.checkpoint import CheckpointingConfig
from nemo_rl.utils.config import ConfigModel

# Sections of the algorithms whose jobs validate by generating and scoring completions.
ON_POLICY_SECTIONS = ("grpo", "distillation")


class EvaluationConfig(ConfigModel):
    """Configures what is evaluated, and how often each problem is completed."""

    models: list[str] = Field(
        default=[],
        description="Hugging Face directories, hub names or embedded models; the command's arguments.",
    )
    num_generations: int = Field(
        1, ge=1, description="Completions per problem. One is greedy unless policy.generation.validation is set."
    )
    k: list[int] | None = Field(
        None, description="Report pass@k for these k. Null: 1, 2, 4, ... up to num_generations, if there are several."
    )
    max_num_problems: int | None = Field(
        None, ge=1, description="Evaluate on the first N problems, divided among the environments. Null: on all."
    )
    subject_key: str | None = Field(
        None, description="Field of the problems whose values, such as topics, get scores of their own. Null: none."
    )
    seed: int = Field(42, ge=0, description="Seed of the sampling.")

    @property
    def ks(self) -> list[int]:
        """The k of all pass@k to report."""
        if self.k is not None or self.num_generations == 1:
            return sorted(set(self.k or ()))
        return [1 << power for power in range(self.num_generations.bit_length())]

    @model_validator(mode="after")
    def _check_k(self) -> EvaluationConfig:
        for k in self.k or ():
            if not 1 <= k <= self.num_generations:
                raise ValueError(f"pass@{k} needs k from 1 to eval.num_generations={self.num_generations}")
        return self


class EvaluatedPolicyConfig(ConfigModel):
    """Configures how the models generate: keys of the section `policy` of a GRPO job."""

    tokenizer_name: str | None = Field(None, description="Hugging Face directory or hub name. Null: the model's own.")
    embedded: EmbeddedModelConfig = Field(default_factory=EmbeddedModelConfig)
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Data type to generate in, unless policy.generation.precision is set."
    )
    max_sequence_length: int = Field(128, ge=2, description="Longest prompt plus completion in tokens.")
    generation: GenerationConfig = Field(default_factory=GenerationConfig)

    def of_model(self, name: str) -> PolicyConfig:
        """Return the section `policy` of a job with this model."""
        return PolicyConfig(model_name=name, **{key: getattr(self, key) for key in type(self).model_fields})


class EvaluationLoggerConfig(ConfigModel):
    """Configures the directory of the evaluation."""

    log_dir: str | None = Field(
        None, description="Directory of the results. Null: results/eval/<number>; an unfinished one is continued."
    )
    report: bool = Field(True, description="Write report.html.")
    num_samples: int = Field(8, ge=0, description="Problems whose completions the report shows.")


class EvalConfig(ConfigModel):
    """Configures an evaluation.

    Example:
        >>> EvalConfig(eval={"num_generations": 8}).eval.ks
        [1, 2, 4, 8]
    """

    eval: EvaluationConfig = Field(default_factory=EvaluationConfig)
    policy: EvaluatedPolicyConfig = Field(default_factory=EvaluatedPolicyConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    env: EnvironmentConfig = Field(default_factory=EnvironmentConfig)
    cluster: BundlesConfig = Field(default_factory=BundlesConfig)
    logger: EvaluationLoggerConfig = Field(default_factory=EvaluationLoggerConfig)

    @property
    def checkpointing(self) -> CheckpointingConfig:
        """What `open_run_directory` asks every job for: an evaluation writes no checkpoints."""
        return CheckpointingConfig(enabled=False)

    @model_validator(mode="after")
    def _check_sizes(self) -> EvalConfig:
        policy = self.policy
        check_sample_length(self.data.max_prompt_length, policy.generation.max_new_tokens, policy.max_sequence_length)
        return self


def from_training(content: dict[str, Any]) -> dict[str, Any]:
    """Convert the content of the configuration file of GRPO or distillation: its validation becomes the evaluation.

    What only training needs is left out, and so is the section `logger`, which names the directory of the training run.
    Other content is returned as it is.

    Example:
        >>> from_training({"grpo": {"seed": 7}, "loss": {"kl_coef": 0.1}, "logger": {"log_dir": "results/x"}})["eval"]
        {'seed': 7}
    """
    name = next((name for name in ON_POLICY_SECTIONS if name in content), None)
    if name is None:
        return content
    algorithm, policy, cluster = (content.get(section) or {} for section in (name, "policy", "cluster"))
    validation = algorithm.get("validation") or {}
    taken = {key: validation[key] for key in ("num_generations", "max_num_problems") if key in validation}
    if "seed" in algorithm:
        taken["seed"] = algorithm["seed"]
    return {
        **{name: content[name] for name in ("data", "env") if name in content},
        "eval": taken,
        "policy": {key: value for key, value in policy.items() if key in EvaluatedPolicyConfig.model_fields},
        "cluster": cluster.get("generation") or {key: cluster[key] for key in cluster if key != "generation"},
    }
