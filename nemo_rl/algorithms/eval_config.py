"""Root of the configuration of an evaluation, and the section `eval` of training jobs."""

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


class ScoringConfig(ConfigModel):
    """Configures which problems are completed how often, and the scores."""

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
    def _check_k(self) -> ScoringConfig:
        for k in self.k or ():
            if not 1 <= k <= self.num_generations:
                raise ValueError(f"pass@{k} needs k from 1 to eval.num_generations={self.num_generations}")
        return self


class EvaluationConfig(ScoringConfig):
    """Configures what is evaluated, and how often each problem is completed."""

    models: list[str] = Field(
        default=[],
        description="Hugging Face directories, hub names or embedded models; the command's arguments.",
    )


class BackgroundEvaluationConfig(ScoringConfig):
    """Configures the evaluation that runs beside training, on workers of its own.

    Example:
        >>> config = BackgroundEvaluationConfig(period=10)
        >>> [step for step in range(25) if config.is_due(step)]
        [0, 10, 20]
    """

    period: int = Field(0, ge=0, description="Evaluate the weights of every Nth step in the background. 0: off.")
    at_start: bool = Field(True, description="Evaluate the weights before the first step, too.")
    at_end: bool = Field(True, description="Evaluate the weights of the last step, too.")
    cluster: BundlesConfig | None = Field(
        None, description="Bundles of its generation. Null: one GPU, or one CPU if the policy runs on CPUs."
    )
    generation: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys of policy.generation that differ for the evaluation. num_workers is not that of "
        "policy.generation; with another backend, nor are options and py_executable.",
    )
    data: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys of data that differ, such as validation. Of jobs that train on conversations: keys of the "
        "section data of GRPO; by default the embedded arithmetic problems.",
    )
    env: dict[str, Any] = Field(
        default_factory=dict,
        description="Its environments, as in the section env of GRPO. Empty: those of the job; without such, math.",
    )

    def is_due(self, step: int) -> bool:
        """Return whether the weights after `step` steps are evaluated, apart from those of the last step."""
        if not self.period:
            return False
        return self.at_start if step == 0 else step % self.period == 0


class EvaluatedPolicyConfig(ConfigModel):
    """Configures how the models generate: keys of the section `policy` of a GRPO job."""

    tokenizer_name: str | None = Field(None, description="Hugging Face directory or hub name. Null: the model's own.")
    embedded: EmbeddedModelConfig = Field(default_factory=EmbeddedModelConfig)
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Data type to generate in, unless policy.generation.precision is set."
    )
    max_sequence_length: int = Field(128, ge=2, description="Longest prompt plus completion in tokens.")
    generation: GenerationConfig = Field(default_factory=GenerationConfig)

    @property
    def generation_precision(self) -> str:
        """The data type to generate in."""
        return self.generation.precision or self.precision

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
    """Convert the content of a training job's configuration file to that of an evaluation.

    It is the evaluation in the background, if the job has one, else the validation of GRPO or distillation. What only
    training needs is left out, and so is the section `logger`, which names the directory of the training run. Other
    content is returned as it is.

    Example:
        >>> from_training({"grpo": {"seed": 7}, "loss": {"kl_coef": 0.1}, "logger": {"log_dir": "results/x"}})["eval"]
        {'seed': 7}
        >>> from_training({"sft": {}, "eval": {"period": 10, "k": [1]}})["eval"]
        {'k': [1]}
    """
    if (content.get("eval") or {}).get("period"):
        return _from_background(content)
    name = next((name for name in ON_POLICY_SECTIONS if name in content), None)
    if name is None:
        return content
    algorithm, cluster = (content.get(section) or {} for section in (name, "cluster"))
    validation = algorithm.get("validation") or {}
    taken = {key: validation[key] for key in ("num_generations", "max_num_problems") if key in validation}
    if "seed" in algorithm:
        taken["seed"] = algorithm["seed"]
    return {
        **{name: content[name] for name in ("data", "env") if name in content},
        "eval": taken,
        "policy": _evaluated_policy(content),
        "cluster": cluster.get("generation") or {key: cluster[key] for key in cluster if key != "generation"},
    }


def _from_background(content: dict[str, Any]) -> dict[str, Any]:
    section, policy = content["eval"], _evaluated_policy(content)
    inherited, changed = dict(policy.get("generation") or {}), section.get("generation") or {}
    backend = inherited.get("backend", GenerationConfig.model_fields["backend"].default)
    of_backend = ("options", "py_executable") if changed.get("backend", backend) != backend else ()
    for key in ("num_workers", *of_backend):
        inherited.pop(key, None)
    policy["generation"] = inherited | changed
    # Other algorithms train on conversations, not on problems.
    of_job = content if {*ON_POLICY_SECTIONS} & {*content} else {}
    environments = section.get("env") or of_job.get("env") or {}
    gpus = (content.get("cluster") or {}).get("gpus_per_node", 0)
    return {
        "data": (of_job.get("data") or {}) | (section.get("data") or {}),
        "env": {name: _without_train_data(entry) for name, entry in environments.items()},
        "eval": {key: section[key] for key in ScoringConfig.model_fields if key in section},
        "policy": policy,
        "cluster": section.get("cluster") or {"gpus_per_node": min(gpus, 1)},
    }


def _without_train_data(entry: Any) -> Any:
    """Return an environment whose section `data` may lack the train problems, which an evaluation does not read."""
    data = entry.get("data") if isinstance(entry, dict) else None
    if not isinstance(data, dict) or "validation" not in data:
        return entry
    return {**entry, "data": {"train": data["validation"], **data}}


def _evaluated_policy(content: dict[str, Any]) -> dict[str, Any]:
    policy = content.get("policy") or {}
    return {key: value for key, value in policy.items() if key in EvaluatedPolicyConfig.model_fields}
