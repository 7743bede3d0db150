"""Estimates the difficulty of problems from their solutions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from nemo_rl.errors import PipelineDefinitionError
from nemo_rl.pipelines.stage import ProcessingStage
from nemo_rl.pipelines.tasks import DocumentBatch

_STEP = re.compile(r"[^.!?\n]+")
_OPERATION = re.compile(r"[=+*/^]|\\times|\\frac|\\cdot|(?<=[\w)}]) ?- ?(?=[\w({\\])")


class SolutionEffortGrade(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Adds a difficulty level that is estimated from the effort in the solution. Needs no model.

    The effort is the number of sentences plus the number of operations and equalities.

    Args:
        solution: column of the worked solution.
        levels: efforts at which the next level begins, in ascending order. `(4, 8)` gives levels 1, 2 and 3.
        output: name of the new column.
    """

    def __init__(
        self, solution: str = "solution", *, levels: Sequence[int] = (6, 9, 12, 20), output: str = "difficulty"
    ) -> None:
        if list(levels) != sorted(set(levels)):
            raise PipelineDefinitionError(f"SolutionEffortGrade: levels must ascend, not {list(levels)}")
        self.solution = solution
        self.levels = list(levels)
        self.output = output

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], [self.solution]

    def outputs(self) -> tuple[list[str], list[str]]:
        return [], [self.output]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        frame = task.to_pandas()
        grades = [1 + sum(_effort(text) >= level for level in self.levels) for text in frame[self.solution]]
        return task.with_data(frame.assign(**{self.output: grades}))


def _effort(text: Any) -> int:
    if not isinstance(text, str):
        return 0
    return sum(1 for part in _STEP.findall(text) if part.strip()) + len(_OPERATION.findall(text))
