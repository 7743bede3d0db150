"""The `env` section of a configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from nemo_rl.data.config import DatasetConfig
from nemo_rl.environments.answers import AnswerFormat
from nemo_rl.utils.config import ConfigModel, OpenSection
from nemo_rl.utils.names import did_you_mean

Weight = float | dict[int, float]


class EpisodeLimits(ConfigModel):
    """When an episode is cut off."""

    max_turns: int = Field(8, ge=1, description="Most actions of an episode.")
    max_tokens: int | None = Field(
        None, ge=2, description="Most tokens of a transcript. Null: policy.max_sequence_length."
    )
    timeout_s: float | None = Field(None, gt=0, description="Most seconds of an episode. Null: no limit.")
    truncated: Literal["mask", "count"] = Field(
        "count",
        description="Whether an episode that was cut off counts with the rewards so far, or is masked: left out of the "
        "loss and of its group's baseline.",
    )


class EnvironmentDataConfig(ConfigModel):
    """The problems of one environment."""

    train: DatasetConfig = Field(description="Training problems.")
    validation: DatasetConfig | None = Field(None, description="Validation problems. Null: none.")


class EnvironmentEntry(EpisodeLimits):
    """One of the environments of a job, by its name in the section `env`."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    class_: str = Field(
        alias="class",
        description="A class with reset and step or a scoring function, as package.module.name; or the name of an "
        "entry point of the group nemo_rl.environments.",
    )
    weight: Weight = Field(
        1.0,
        description="Share of the problems, relative to the other environments. A mapping from steps to weights is "
        "interpolated linearly.",
    )
    config: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the class.")
    data: EnvironmentDataConfig | None = Field(None, description="Its problems. Null: those of the section data.")
    py_executable: str | None = Field(
        None, description="Python of its workers. Null: the registered one, or that of the driver."
    )
    runtime_env: dict[str, Any] | None = Field(None, description="Ray's RuntimeEnv of its workers.")
    own_process: bool = Field(
        False,
        description="Run its code in a child process of the worker, whose Python needs neither Ray nor the driver's "
        "version.",
    )
    num_replicas: int = Field(1, ge=1, description="Number of workers.")
    num_cpus: float = Field(0.0, ge=0, description="CPUs that Ray reserves for each worker.")
    num_gpus: float = Field(
        0.0,
        ge=0,
        description="GPUs that Ray reserves for each worker, beside those of policy and generation. 0: it sees none.",
    )
    resources: dict[str, float] = Field(
        default_factory=dict, description="Further resources that Ray reserves for each worker, by their names."
    )
    concurrency: int = Field(16, ge=1, description="Most episodes that run in a worker at the same time.")
    step_timeout_s: float | None = Field(
        300.0, gt=0, description="A call that takes more seconds has failed. Null: no limit."
    )
    memory_limit_mb: int | None = Field(
        None, ge=1, description="A worker that uses more memory, in MiB, is restarted. Null: no limit."
    )
    max_restarts: int = Field(20, ge=0, description="How often a worker of this environment may be restarted.")

    @field_validator("weight")
    @classmethod
    def _check_weight(cls, weight: Weight) -> Weight:
        values = list(weight.values()) if isinstance(weight, dict) else [weight]
        if not values or min(values) < 0 or not all(map(math.isfinite, values)):
            raise ValueError(
                f"a weight is a finite number of at least 0, or a mapping from steps to such, got {weight}"
            )
        return weight

    def weight_at(self, step: int) -> float:
        """Return the weight at a training step, counted from 1.

        Example:
            >>> EnvironmentEntry(class_="game.Nim", weight={1: 0.0, 11: 1.0}).weight_at(6)
            0.5
        """
        if not isinstance(self.weight, dict):
            return self.weight
        points = sorted(self.weight.items())
        if step <= points[0][0]:
            return points[0][1]
        for (start, first), (end, last) in pairwise(points):
            if step <= end:
                return first + (last - first) * (step - start) / (end - start)
        return points[-1][1]


class MathEnvironmentConfig(ConfigModel):
    """The math environment: `math-verify` in a pool of disposable processes."""

    weight: float | None = Field(
        None, ge=0, description="Share of the problems beside other environments. Null: only if there are no others."
    )

    num_workers: int = Field(1, ge=1, description="Verify processes. They start when an answer needs computer algebra.")
    timeout_s: float = Field(
        5.0, gt=0, description="CPU time limit for one answer, in seconds. A slower answer is wrong."
    )
    memory_limit_mb: int = Field(2048, ge=128, description="Address space that one verify process may add, in MiB.")
    max_answer_chars: int = Field(2000, ge=1, le=10_000, description="A longer answer is wrong.")
    answer_format: AnswerFormat = Field(
        "boxed",
        description="Where the answer is: the last \\boxed{}, the last number, the whole completion, "
        "the last <answer> tag, or the line after the last ####.",
    )


class EnvironmentConfig(OpenSection):
    """The RL environments: one that scores batches of completions (`name`), or several with turns, by their names.

    Example:
        >>> config = EnvironmentConfig(nim={"class": "my_package.games.Nim"}, math={"weight": 2})
        >>> sorted(config.entries())
        ['math', 'nim']
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, EnvironmentEntry]
    entry: ClassVar[type[ConfigModel] | None] = EnvironmentEntry

    name: str = Field(
        "math",
        description="The environment of a job without further keys here: a name in "
        "nemo_rl.environments.registry.ENVIRONMENTS.",
    )
    math: MathEnvironmentConfig = Field(default_factory=MathEnvironmentConfig)
    options: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the environment `name`, if it has no section here."
    )
    max_failed_fraction: float = Field(
        0.1, ge=0, lt=1, description="Most episodes of a step that may fail for good. The others are trained on."
    )
    max_retries: int = Field(2, ge=0, description="How often a failed episode is repeated from its seed.")

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        for name in [name for name in content if name not in cls.model_fields]:
            if not re.fullmatch(r"[A-Za-z][\w-]*", str(name)):
                raise ValueError(f"env.{name}: the name of an environment consists of letters, digits, _ and -")
            value = content[name]
            if not isinstance(value, EnvironmentEntry) and not (
                isinstance(value, Mapping) and {"class", "class_"} & {*value}
            ):
                raise ValueError(
                    f"env.{name}: an environment needs the key class.{did_you_mean(name, cls.model_fields)}"
                )
        return content

    @model_validator(mode="after")
    def _check_weights(self) -> EnvironmentConfig:
        entries = self.entries()
        if entries and "name" in self.model_fields_set and self.name != "math":
            raise ValueError(
                f"env.name={self.name} is for a job with one environment; beside {', '.join(entries)}, "
                f"write env.{self.name}.class={self.name}"
            )
        if entries and not any(isinstance(e.weight, dict) or e.weight > 0 for e in entries.values()):
            raise ValueError("env: no environment has a weight above 0")
        return self

    def entries(self) -> dict[str, EnvironmentEntry]:
        """Return the environments with turns, by name, in the order of the configuration; empty without such.

        The math environment, whose episodes have one turn, is one of them if it has a weight.
        """
        entries = dict(self.__pydantic_extra__ or {})
        if entries and self.math.weight is not None:
            math_entry = EnvironmentEntry(
                class_="math", weight=self.math.weight, config={"config": self.math}, max_turns=1
            )
            entries = {"math": math_entry, **entries}
        return entries

    def actor_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments for the actor class of the environment `name`."""
        if self.name == "math":
            return {"config": self.math}
        return dict(self.options)
