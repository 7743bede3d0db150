"""Checks the answers of mathematical problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rl.environments.answers import (
    AnswerFormat,
    answer_key_fault,
    compare_cheaply,
    extract_answer,
    needs_algebra,
    normalise,
    to_latex,
)
from nemo_rl.environments.verify_pool import VerifyPool, VerifyRequest
from nemo_rl.pipelines.stage import ProcessingStage
from nemo_rl.pipelines.stages.text import drop_rows
from nemo_rl.pipelines.tasks import DocumentBatch

_MAX_ANSWER_CHARS = 500


class MathAnswerCheck(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Drops problems whose answer cannot be parsed as mathematics, or differs from the answer of their solution.

    Answers are compared as in the RL environment: by math-verify and sympy, in separate processes that malicious text
    may hang or crash. `runtime_env={"uv": ["sympy==1.13.3"]}` selects another version of sympy.

    Args:
        answer: column of the answer.
        solution: column of a worked solution. With None, only the answer is parsed.
        solution_format: where a solution states its answer, see `environments.answers.extract_answer`.
        output: column for the version of sympy that accepted the row; None adds no column.
        num_processes: verification processes per worker.
        timeout_s: CPU seconds per answer.
        memory_limit_mb: memory limit of each verification process.
    """

    def __init__(
        self,
        answer: str = "answer",
        solution: str | None = None,
        *,
        solution_format: AnswerFormat = "boxed",
        output: str | None = None,
        num_processes: int = 1,
        timeout_s: float = 5.0,
        memory_limit_mb: int = 2048,
    ) -> None:
        self.answer = answer
        self.solution = solution
        self.solution_format: AnswerFormat = solution_format
        self.output = output
        self.num_processes = num_processes
        self.timeout_s = timeout_s
        self.memory_limit_mb = memory_limit_mb

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], [self.answer, *([self.solution] if self.solution else [])]

    def outputs(self) -> tuple[list[str], list[str]]:
        return [], [self.output] if self.output else []

    def setup(self) -> None:
        import sympy

        self._version = f"sympy {sympy.__version__}"
        self._pool = VerifyPool(self.num_processes, self.timeout_s, self.memory_limit_mb)

    def process(self, task: DocumentBatch) -> DocumentBatch | None:
        frame = task.to_pandas()
        if self.output:
            frame = frame.assign(**{self.output: self._version})
        faults = self._unreadable(list(frame[self.answer]))
        if self.solution:
            self._compare(list(frame[self.answer]), list(frame[self.solution]), faults)
        return drop_rows(self, task.with_data(frame), faults)

    def teardown(self) -> None:
        self._pool.close()

    def _unreadable(self, answers: Sequence[Any]) -> list[str | None]:
        faults: list[str | None] = [None] * len(answers)
        questions: dict[int, VerifyRequest] = {}
        for index, answer in enumerate(answers):
            if not isinstance(answer, str) or not answer.strip():
                faults[index] = "no answer"
            elif len(answer) > _MAX_ANSWER_CHARS:
                faults[index] = f"answer longer than {_MAX_ANSWER_CHARS} characters"
            elif fault := answer_key_fault(answer):
                faults[index] = f"answer that cannot be compared: {fault}"
            elif needs_algebra(normalise(answer)):
                questions[index] = VerifyRequest(to_latex(normalise(answer)))
        for index, outcome in self._outcomes(questions).items():
            if outcome != "parsed":
                faults[index] = f"answer that {self._version} cannot read ({outcome})"
        return faults

    def _compare(self, answers: Sequence[Any], solutions: Sequence[Any], faults: list[str | None]) -> None:
        questions: dict[int, VerifyRequest] = {}
        for index, (answer, solution) in enumerate(zip(answers, solutions)):
            if faults[index] is not None:
                continue
            extracted = extract_answer(solution, self.solution_format) if isinstance(solution, str) else None
            if extracted is None:
                faults[index] = "solution without an answer"
                continue
            truth, other = normalise(answer), normalise(extracted)
            same = compare_cheaply(other, truth)
            if same is None:
                questions[index] = VerifyRequest(to_latex(truth), to_latex(other))
            elif not same:
                faults[index] = "answer is not the solution's"
        for index, outcome in self._outcomes(questions).items():
            if outcome != "equal":
                faults[index] = f"answer is not the solution's ({outcome})"

    def _outcomes(self, questions: Mapping[int, VerifyRequest]) -> dict[int, str]:
        results = self._pool.verify(list(questions.values()))
        return {index: result.outcome for index, result in zip(questions, results)}
