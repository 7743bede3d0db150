"""What the training loop knows about an RL environment.

An environment judges completions. It lives in a Ray actor whose class is named in
`nemo_rl.environments.registry.ENVIRONMENTS`; the loop calls the three methods below and nothing else. A sample that
the environment *could not judge* is an `EnvironmentFailure`, never a reward of 0: a reward of 0 says that the answer
was judged and is wrong.
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
    """What an environment says about a batch of completions, in the batch's order.

    Attributes:
        rewards: float32 [batch].
        terminated: bool [batch]; False asks for another turn.
        answers: per sample the answer as it was extracted, or None when the completion holds none.
        status: per sample "ok" (judged), "timeout" (judging it took too long) or "unparseable" (it holds no answer, or
            none that can be compared). The last two are wrong answers: their reward is 0.
        latency_s: float64 [batch]; seconds spent on judging the sample, waiting for a free judge not counted.
        observations: multi-turn only: per sample the text that is appended before the next turn, or None.
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
    """An RL task. Implementations are plain classes; the caller makes them Ray actors.

    `step` may be called from several threads at once (an actor started with `max_concurrency`).
    """

    @abstractmethod
    def step(self, completions: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> EnvironmentReturn:
        """Judge a batch.

        Args:
            completions: what the model wrote after the prompt, one per sample, special tokens removed.
            metadata: one record per sample with what the environment needs to judge it (which keys: see the
                implementation).

        Raises:
            EnvironmentFailure: at least one sample could not be judged, for a reason that is not the model's.
        """

    @abstractmethod
    def global_post_process_and_metrics(self, result: EnvironmentReturn) -> tuple[EnvironmentReturn, dict[str, float]]:
        """Adjust a step's whole result (all workers' samples together) and sum it up.

        Returns:
            The result to train on, and metrics by flat name without prefix ("accuracy", ...). An empty batch has no
            metrics.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """Stop everything that the environment started. Idempotent; `step` raises afterwards."""
