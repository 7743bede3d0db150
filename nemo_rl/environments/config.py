"""The `env` section of a configuration."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from nemo_rl.environments.answers import AnswerFormat
from nemo_rl.utils.config import ConfigModel


class MathEnvironmentConfig(ConfigModel):
    """The math environment: `math-verify` in a pool of disposable processes."""

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


class EnvironmentConfig(ConfigModel):
    """The RL environment that scores completions."""

    name: str = Field("math", description="A name in nemo_rl.environments.registry.ENVIRONMENTS.")
    math: MathEnvironmentConfig = Field(default_factory=MathEnvironmentConfig)
    options: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of an environment without its own section here."
    )

    def actor_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments for the actor class of the environment `name`."""
        if self.name == "math":
            return {"config": self.math}
        return dict(self.options)
