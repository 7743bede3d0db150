"""The procedural tasks of `reasoning-gym`: arithmetic, algebra, logic, games, graphs and others, with their own scores.

Tested with reasoning-gym 0.1.25. It needs no data set: use `data: {train: {kind: seeds}}`.
"""

from __future__ import annotations

from typing import Any

import reasoning_gym
from reasoning_gym.utils import extract_answer

from nemo_rl.environments.episode import Environment, Turn


class ReasoningGym(Environment):
    """One task of a data set of reasoning-gym; one turn.

    Args:
        dataset: Name of the data set, such as "chain_sum".
        instruction: Text behind the question. By default it asks for the answer in the tag that is scored.
        tag: The answer is what the last `<tag>...</tag>` holds. None: the whole completion.
        options: Options of the data set, such as `{"min_terms": 2}`.

    Raises:
        ValueError: There is no such data set.
    """

    def __init__(
        self,
        dataset: str,
        *,
        instruction: str | None = None,
        tag: str | None = "answer",
        options: dict[str, Any] | None = None,
    ) -> None:
        self._name, self._tag, self._options = dataset, tag, options or {}
        if instruction is None:
            instruction = "" if tag is None else f"Write the final answer as <{tag}>...</{tag}>."
        self._instruction = instruction

    def reset(self, problem: dict[str, Any]) -> str:
        self._dataset = reasoning_gym.create_dataset(self._name, size=1, seed=problem["seed"], **self._options)
        self._entry = self._dataset[0]
        return f"{self._entry['question']}\n{self._instruction}".rstrip()

    def step(self, action: str) -> Turn:
        answer = action.strip() if self._tag is None else extract_answer(action, self._tag)
        score = float(self._dataset.score_answer(answer, self._entry))
        return Turn(score, done=True, info={"answered": answer is not None, "solved": score >= 1.0}, answer=answer)
