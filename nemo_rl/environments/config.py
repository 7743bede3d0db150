"""The `env` section of a configuration."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from nemo_rl.environments.answers import AnswerFormat
from nemo_rl.utils.config import ConfigModel


class MathEnvironmentConfig(ConfigModel):
    """The math environment: `math-verify` in a pool of disposable processes."""

    num_workers: int = Field(
        1, ge=1, description="Verify processes; they start when an answer needs more than a comparison."
    )
    timeout_s: float = Field(
        5.0, gt=0, description="Longest computing time for one answer, in seconds; beyond it the answer is wrong."
    )
    memory_limit_mb: int = Field(2048, ge=128, description="Address space that one verify process may grow by, in MiB.")
    max_answer_chars: int = Field(2000, ge=1, le=10_000, description="A longer answer is wrong: nobody writes one.")
    answer_format: AnswerFormat = Field(
        "boxed",
        description="What counts as the answer: the last \\boxed{}, the last number, the whole completion, "
        "the last <answer> tag, or the line after the last ####.",
    )


class EnvironmentConfig(ConfigModel):
    """Which RL environment judges the completions."""

    name: str = Field("math", description="A name in nemo_rl.environments.registry.ENVIRONMENTS.")
    math: MathEnvironmentConfig = Field(default_factory=MathEnvironmentConfig)
    options: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of an environment that has no section of its own here."
    )

    def actor_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for the actor class of the environment `name`."""
        if self.name == "math":
            return {"config": self.math}
        return dict(self.options)
