"""An environment that asks for a word written backwards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn
from nemo_rl.errors import EnvironmentFailure


class ReverseEnvironment(EnvironmentInterface):
    """Gives reward 1 for `metadata["word"]` backwards, else 0."""

    def step(
        self, completions: Sequence[str], metadata: Sequence[Mapping[str, object]]
    ) -> EnvironmentReturn:
        start = time.perf_counter()
        try:
            words = [str(record["word"]) for record in metadata]
        except KeyError:
            # The data set is wrong, not the completion: an error, not a reward of 0.
            raise EnvironmentFailure(
                "a sample has no 'word'; use a data set for the environment `reverse`"
            ) from None
        answers = [completion.strip() for completion in completions]
        correct = [a == word[::-1] for a, word in zip(answers, words, strict=True)]
        seconds = (time.perf_counter() - start) / max(1, len(answers))
        return EnvironmentReturn(
            rewards=np.array(correct, dtype=np.float32),
            terminated=np.ones(len(answers), dtype=np.bool_),
            answers=list(answers),
            status=["ok" if answer else "unparseable" for answer in answers],
            latency_s=np.full(len(answers), seconds),
        )

    def global_post_process_and_metrics(
        self, result: EnvironmentReturn
    ) -> tuple[EnvironmentReturn, dict[str, float]]:
        if not result.size:
            return result, {}
        return result, {"accuracy": float(result.rewards.mean())}

    def shutdown(self) -> None:
        """Do nothing; the environment starts no processes."""
