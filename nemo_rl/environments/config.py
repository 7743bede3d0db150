"""The `env` section of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nemo_rl.utils.config import ConfigModel


class MathEnvironmentConfig(ConfigModel):
    """The math environment: `math-verify` in a pool of disposable processes."""

    num_workers: int = Field(
        1, ge=1, description="Verify processes; they start when an answer needs more than a comparison."
    )
    timeout_s: float = Field(
        5.0, gt=0, description="Longest time for one answer, in seconds; beyond it the answer is wrong."
    )
    memory_limit_mb: int = Field(2048, ge=128, description="Address space that one verify process may grow by, in MiB.")
    max_answer_chars: int = Field(10_000, ge=1, description="Longer completions are judged by their last part only.")
    answer_format: Literal["boxed", "last_number", "whole"] = Field(
        "boxed", description="What counts as the answer: the last \\boxed{}, the last number, or the whole completion."
    )


class EnvironmentConfig(ConfigModel):
    """Which RL environment judges the completions."""

    name: str = Field("math", description="A name in nemo_rl.environments.registry.ENVIRONMENTS.")
    math: MathEnvironmentConfig = Field(default_factory=MathEnvironmentConfig)
