"""A task for a language model: write a word backwards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn
from nemo_rl.errors import EnvironmentFailure


class ReverseEnvironment(EnvironmentInterface):
    """Reward 1 for `metadata["word"]` backwards, else 0."""

    def step(self, completions: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> EnvironmentReturn:
        start = time.perf_counter()
        try:
            words = [str(record["word"]) for record in metadata]
        except KeyError:
            # Not the model's fault, so not a reward of 0.
            raise EnvironmentFailure("a sample has no 'word': the data set does not fit this environment") from None
        answers = [completion.strip() for completion in completions]
        rewards = np.array([float(a == word[::-1]) for a, word in zip(answers, words, strict=True)], dtype=np.float32)
        return EnvironmentReturn(
            rewards=rewards,
            terminated=np.ones(len(answers), dtype=np.bool_),
            answers=list(answers),
            status=["ok" if answer else "unparseable" for answer in answers],
            latency_s=np.full(len(answers), (time.perf_counter() - start) / max(1, len(answers))),
        )

    def global_post_process_and_metrics(self, result: EnvironmentReturn) -> tuple[EnvironmentReturn, dict[str, float]]:
        return result, {"accuracy": float(result.rewards.mean())} if result.size else {}

    def shutdown(self) -> None:
        """Nothing was started."""
