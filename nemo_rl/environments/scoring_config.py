"""The configuration of environments that score conversations: a reward model and a judge."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from nemo_rl import settings
from nemo_rl.environments.class_lookup import check_class
from nemo_rl.errors import ConfigError
from nemo_rl.utils.config import ConfigModel
from nemo_rl.utils.model_paths import check_model_path
from nemo_rl.utils.names import suggest_or_list

Range = tuple[float, float]

PLACEHOLDERS = ("problem", "answer", "reference", "conversation")
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]+)\}")


class DeclaredConfig(ConfigModel):
    """Base class of the keyword arguments of an environment that are checked before anything starts.

    `registry.DECLARED_CONFIGS` says which environment has which.
    """

    def check(self, where: str) -> None:
        """Raise `ConfigError` if something is wrong that shows on this machine. `where` names the section."""

    def variables(self) -> dict[str, str]:
        """Return the environment variables of this process that the workers need."""
        return {}


class ScoredEnvironmentConfig(ConfigModel):
    """An environment whose episodes are scored at their end."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    class_: str = Field(alias="class", description="Its class or scoring function, as package.module.name.")
    config: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the class.")
    reward_weight: float = Field(
        1.0, allow_inf_nan=False, description="Factor of its own rewards, to which the score is added."
    )

    @field_validator("class_")
    @classmethod
    def _check_class(cls, name: str) -> str:
        if "." not in name:
            raise ValueError("give the class as package.module.name")
        return name


class ScoringConfig(DeclaredConfig):
    """What all scorers of conversations have in common."""

    environment: ScoredEnvironmentConfig | None = Field(
        None, description="Score the episodes of this environment at their end. Null: score the answer to the prompt."
    )
    scale: float = Field(1.0, allow_inf_nan=False, description="Factor of the score.")
    offset: float = Field(0.0, allow_inf_nan=False, description="Added to the score after `scale`.")
    clamp: Range | None = Field(None, description="Limits of the result, as [lowest, highest]. Null: none.")

    @field_validator("clamp")
    @classmethod
    def _check_clamp(cls, clamp: Range | None) -> Range | None:
        return clamp if clamp is None else _checked_range(clamp)

    def check(self, where: str) -> None:
        """See `DeclaredConfig.check`."""
        if (scored := self.environment) is not None:
            check_class(f"{where}.environment", scored.class_, scored.config, in_driver_python=False)

    def reward(self, score: float) -> float:
        """Return the reward of a score.

        Example:
            >>> ScoringConfig(scale=0.5, offset=1.0, clamp=[0, 2]).reward(-1.0)
            0.5
        """
        reward = score * self.scale + self.offset
        return reward if self.clamp is None else min(max(reward, self.clamp[0]), self.clamp[1])


class RewardModelConfig(ScoringConfig):
    """A reward model: a transformers model for sequence classification with one label."""

    model: str = Field(description="Directory or hub name of the reward model, with its tokenizer.")
    max_length: int | None = Field(
        None, ge=2, description="Longest conversation in tokens. Null: the context of the model."
    )
    too_long: Literal["fail", "truncate"] = Field(
        "fail",
        description="What happens with longer conversations: the step fails, or their first tokens are left out.",
    )
    batch_size: int = Field(16, ge=1, description="Most conversations in one forward pass.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Data type of the weights. auto: that of the files."
    )

    def check(self, where: str) -> None:
        """See `DeclaredConfig.check`."""
        super().check(where)
        check_model_path(self.model, f"{where}.model")
        directory = Path(self.model).expanduser()
        if directory.is_dir():
            _check_is_reward_model(directory / "config.json", f"{where}.model: {self.model}")


class JudgeConfig(ScoringConfig):
    """A language model that is asked for a score, over an OpenAI-compatible API."""

    base_url: str = Field(description="Address of the API, such as http://10.0.0.7:8000/v1.")
    model: str = Field(description="Name of the model at the API.")
    api_key_variable: str | None = Field(
        None, description="Environment variable with the key of the API. The workers receive it. Null: no key."
    )
    template: str = Field(
        description="What the judge reads: a text with the placeholders {problem}, {answer}, {reference} (the expected "
        "answer) and {conversation} (all messages)."
    )
    pattern: str | None = Field(
        None, description="Regular expression with one group, whose last match in the judge's answer is the score."
    )
    json_field: str | None = Field(
        None, description="Field with the score, of the last JSON object in the judge's answer that has it."
    )
    verdicts: dict[str, float] | None = Field(
        None,
        description='Scores of words such as {"yes": 1, "no": 0}, if the judge answers with words. Null: numbers.',
    )
    score_range: Range = Field(
        (0.0, 1.0), description="Lowest and highest number. A score outside of it counts as unreadable."
    )
    max_asks: int = Field(
        3, ge=1, description="How often the judge is asked, each time with another seed, until its score is readable."
    )
    max_retries: int = Field(
        5, ge=0, description="How often a request is repeated after status 429 or 5xx or a lost connection."
    )
    timeout_s: float = Field(120.0, gt=0, description="A request that takes more seconds has failed.")
    sends_seed: bool = Field(True, description="Send the field seed. False: for an API that refuses it.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Further fields of the request, such as {temperature: 0, max_tokens: 512}."
    )

    @field_validator("base_url")
    @classmethod
    def _check_base_url(cls, url: str) -> str:
        if not re.match(r"https?://[^/\s]", url):
            raise ValueError("an address begins with http:// or https://")
        return url

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        names = _PLACEHOLDER.findall(template)
        for name in names:
            if name not in PLACEHOLDERS:
                raise ValueError(f"there is no placeholder {{{name}}}{suggest_or_list(name, PLACEHOLDERS)}")
        if not {"answer", "conversation"} & {*names}:
            raise ValueError("it has neither {answer} nor {conversation}, so the judge would not see what to score")
        return template

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            num_groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"it is no regular expression: {error}") from None
        if num_groups != 1:
            raise ValueError(f"it has {num_groups} groups; put the score, and only it, into parentheses")
        return pattern

    @field_validator("verdicts", mode="before")
    @classmethod
    def _check_words(cls, verdicts: Any) -> Any:
        for word in verdicts if isinstance(verdicts, Mapping) else ():
            if not isinstance(word, str):
                raise ValueError(
                    f'the word {word} is no text; write it in quotes, as "yes" and "no", which YAML changes'
                )
        return verdicts

    @field_validator("score_range")
    @classmethod
    def _check_score_range(cls, limits: Range) -> Range:
        return _checked_range(limits)

    @model_validator(mode="after")
    def _check_one_way_to_read(self) -> JudgeConfig:
        if (self.pattern is None) == (self.json_field is None):
            raise ValueError("set either pattern or json_field, which say where the score is in the judge's answer")
        return self

    def check(self, where: str) -> None:
        """See `DeclaredConfig.check`."""
        super().check(where)
        if self.api_key_variable is not None and not settings.snapshot().get(self.api_key_variable):
            raise ConfigError(
                f"{where}.api_key_variable: the variable {self.api_key_variable} is not set; export it, or set "
                "api_key_variable=null for an API without a key"
            )

    def variables(self) -> dict[str, str]:
        """See `DeclaredConfig.variables`."""
        name = self.api_key_variable
        value = None if name is None else settings.snapshot().get(name)
        return {} if name is None or value is None else {name: value}

    def prompt(self, values: Mapping[str, str]) -> str:
        """Return the template with the values of its placeholders. Braces in the values have no meaning.

        Example:
            >>> config = JudgeConfig(
            ...     base_url="http://localhost/v1", model="judge", template="{problem}? {answer}!", pattern="(.)"
            ... )
            >>> config.prompt({"problem": "1 + 1", "answer": "{problem}"})
            '1 + 1? {problem}!'
        """
        return _PLACEHOLDER.sub(lambda match: values[match[1]], self.template)

    def uses(self, placeholder: str) -> bool:
        """Return whether the template has a placeholder."""
        return placeholder in _PLACEHOLDER.findall(self.template)


def _checked_range(limits: Range) -> Range:
    low, high = limits
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError("give two finite numbers, the lower one first")
    return limits


def _check_is_reward_model(path: Path, subject: str) -> None:
    """Raise `ConfigError` if a `config.json` is that of another kind of model."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        architectures = list(content.get("architectures") or [])
        num_labels = len(content["id2label"]) if "id2label" in content else 2  # transformers leaves out its default
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{subject}: {path} cannot be read: {error}") from error
    if architectures and not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        raise ConfigError(
            f"{subject} is a {architectures[0]}, which scores no texts; give a model for sequence classification with "
            "one label"
        )
    if num_labels != 1:
        raise ConfigError(f"{subject} has {num_labels} labels; a reward model has one, the score")
