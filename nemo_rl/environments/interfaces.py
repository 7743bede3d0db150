"""The interface between the training loop and an RL environment.

An environment scores completions. It runs in a Ray actor whose class `nemo_rl.environments.registry.ENVIRONMENTS`
names; the loop calls only the three methods below. If the environment *cannot score* a sample, it raises
`EnvironmentFailure` and never returns a reward of 0: a reward of 0 means that the answer was scored and is wrong.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

SampleStatus = Literal["ok", "timeout", "unparseable"]


@dataclass(frozen=True)
class EnvironmentReturn:
    """Holds the scores of a batch of completions, in the batch's order.

    Attributes:
        rewards: float32 [batch].
        terminated: bool [batch]; False requests another turn.
        answers: The extracted answer of each sample, or None if the completion contains no answer.
        status: For each sample "ok" (scored), "timeout" (scoring took too long) or "unparseable" (there is no answer,
            or it cannot be compared). The last two are wrong answers: their reward is 0.
        latency_s: float64 [batch]; seconds spent on scoring the sample, without the time in a queue.
        observations: Multi-turn only: for each sample the text to append before the next turn, or None.

    Raises:
        ValueError: The fields have different lengths.
    """

    rewards: npt.NDArray[np.float32]
    terminated: npt.NDArray[np.bool_]
    answers: list[str | None]
    status: list[SampleStatus]
    latency_s: npt.NDArray[np.float64]
    observations: list[str | None] | None = None

    def __post_init__(self) -> None:
        batch = len(self.answers)
        lengths = {
            "rewards": self.rewards.shape,
            "terminated": self.terminated.shape,
            "status": (len(self.status),),
            "latency_s": self.latency_s.shape,
            "observations": (batch,) if self.observations is None else (len(self.observations),),
        }
        wrong = {name: shape for name, shape in lengths.items() if shape != (batch,)}
        if wrong:
            raise ValueError(f"EnvironmentReturn: {batch} answers, but these fields have another shape: {wrong}")

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.answers)


class EnvironmentInterface(ABC):
    """Scores the completions of one RL task. Implementations are plain classes; the caller makes them Ray actors.

    `step` may be called from several threads at once (in an actor with `max_concurrency`).

    Example:

        class LengthEnvironment(EnvironmentInterface):
            def step(self, completions, metadata):
                size = len(completions)
                rewards = np.array([len(text) < 100 for text in completions], np.float32)
                return EnvironmentReturn(rewards, np.ones(size, bool), list(completions), ["ok"] * size, np.zeros(size))

            def global_post_process_and_metrics(self, result):
                return result, {"accuracy": float(result.rewards.mean())}

            def shutdown(self):
                pass
    """

    @abstractmethod
    def step(self, completions: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> EnvironmentReturn:
        """Score a batch of completions.

        Args:
            completions: The model's text after the prompt, one per sample, without special tokens.
            metadata: One record per sample with the data that the environment needs to score it. The implementation
                documents the keys.

        Raises:
            EnvironmentFailure: At least one sample cannot be scored, and the model's text is not the cause.
        """

    @abstractmethod
    def global_post_process_and_metrics(self, result: EnvironmentReturn) -> tuple[EnvironmentReturn, dict[str, float]]:
        """Post-process the result of a whole step (the samples of all workers), and compute its metrics.

        Returns:
            The result to train on, and metrics by flat name without prefix ("accuracy", ...). An empty batch has no
            metrics.
        """

    def prepare(self) -> None:
        """Do in advance what the first `step` would wait for, such as starting processes. Optional and idempotent.

        The job calls it when its workers are ready, and does not wait for it: it runs while the first completions are
        generated.
        """
        return

    @abstractmethod
    def shutdown(self) -> None:
        """Stop all processes that the environment started. Idempotent; `step` raises afterwards."""
