"""A generated data set of words to write backwards."""

from __future__ import annotations

import random
from typing import Self

from nemo_rl.data.config import DataConfig, DatasetConfig
from nemo_rl.data.problem import Problem, ProblemDataset, Role
from nemo_rl.errors import DataError

SHORTEST, LONGEST = 2, 4


class WordsDataset(ProblemDataset):
    """Uses numbers of two to four digits as words, in two disjoint splits."""

    def __init__(self, words: list[str]) -> None:
        self._words = words

    @classmethod
    def from_config(cls, config: DatasetConfig, data: DataConfig, role: Role) -> Self:
        words = [str(number) for number in range(10 ** (SHORTEST - 1), 10**LONGEST)]
        random.Random(data.arithmetic.seed).shuffle(words)
        held_out = len(words) // 8
        words = words[:held_out] if role == "validation" else words[held_out:]
        num_words = config.max_num_problems or len(words)
        if num_words > len(words):
            raise DataError(
                f"data.{role}.max_num_problems={num_words}: "
                f"there are only {len(words)} words"
            )
        return cls(words[:num_words])

    def __len__(self) -> int:
        return len(self._words)

    def problem(self, index: int) -> Problem:
        word = self._words[index]
        # The environment receives the metadata and the answer as `ground_truth`.
        return Problem(
            prompt=f"{word} backwards=",
            answer=word[::-1],
            index=index,
            metadata={"word": word},
        )

    def where(self, index: int) -> str:
        return f"word {self._words[index]!r}"
