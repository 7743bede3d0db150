"""Repairs, filters and counts text."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from nemo_rl.errors import PipelineDefinitionError
from nemo_rl.pipelines.stage import ProcessingStage
from nemo_rl.pipelines.tasks import DocumentBatch

MAX_EXAMPLES = 3


class TextRepair(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Repairs text with ftfy (mis-decoded UTF-8, HTML entities, control characters) and normalizes its Unicode.

    The stage runs in an additive venv with ftfy over the driver's Python.

    Args:
        columns: text columns. Missing values stay missing.
        form: Unicode normal form.
        collapse_spaces: replace runs of whitespace by one space, and strip lines.
    """

    runtime_env: Mapping[str, Any] | None = {"uv": ["ftfy==6.3.1"]}

    def __init__(
        self,
        columns: Sequence[str],
        *,
        form: Literal["NFC", "NFKC"] = "NFC",
        collapse_spaces: bool = True,
    ) -> None:
        self.columns = list(columns)
        self.form: Literal["NFC", "NFKC"] = form
        self.collapse_spaces = collapse_spaces

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], self.columns

    def setup(self) -> None:
        import ftfy

        self._fix = ftfy.fix_text
        # Quotes have a meaning in code and in mathematics: f' is the derivative of f.
        self._config = ftfy.TextFixerConfig(uncurl_quotes=False, normalization=self.form)

    def process(self, task: DocumentBatch) -> DocumentBatch:
        frame = task.to_pandas()
        changed = set()
        for column in self.columns:
            before = list(frame[column])
            after = [value if not isinstance(value, str) else self._repaired(value) for value in before]
            changed |= {i for i, (a, b) in enumerate(zip(before, after)) if isinstance(a, str) and a != b}
            frame[column] = after
        task.data = frame
        task._metadata["num_repaired"] = len(changed)
        return task

    def _repaired(self, text: str) -> str:
        fixed = unicodedata.normalize(self.form, self._fix(text, self._config))
        if self.collapse_spaces:
            fixed = "\n".join(" ".join(line.split()) for line in fixed.split("\n")).strip()
        return fixed


class TextFilter(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Drops rows whose text is missing, too short, too long, or made of too few letters and digits.

    Args:
        column: column of the text.
        min_chars: minimum length.
        max_chars: maximum length; None sets no limit.
        min_alphanumeric: minimum share of letters and digits among the characters that are not whitespace.
        max_repeated_lines: maximum share of lines that repeat an earlier line.
    """

    def __init__(
        self,
        column: str,
        *,
        min_chars: int = 1,
        max_chars: int | None = None,
        min_alphanumeric: float = 0.0,
        max_repeated_lines: float = 1.0,
    ) -> None:
        if min_chars < 0 or (max_chars is not None and max_chars < min_chars):
            raise PipelineDefinitionError(f"TextFilter: min_chars={min_chars} and max_chars={max_chars} leave nothing")
        self.column = column
        self.min_chars = min_chars
        self.max_chars = max_chars
        self.min_alphanumeric = min_alphanumeric
        self.max_repeated_lines = max_repeated_lines

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], [self.column]

    def process(self, task: DocumentBatch) -> DocumentBatch | None:
        frame = task.to_pandas()
        return drop_rows(self, task, [self._fault(value) for value in frame[self.column]])

    def _fault(self, text: Any) -> str | None:
        if not isinstance(text, str):
            return "no text"
        if len(text) < self.min_chars:
            return f"shorter than {self.min_chars} characters"
        if self.max_chars is not None and len(text) > self.max_chars:
            return f"longer than {self.max_chars} characters"
        visible = [c for c in text if not c.isspace()]
        if sum(map(str.isalnum, visible)) < self.min_alphanumeric * len(visible):
            return f"less than {self.min_alphanumeric:.0%} letters and digits"
        lines = [line for line in text.split("\n") if line.strip()]
        if lines and 1 - len(set(lines)) / len(lines) > self.max_repeated_lines:
            return f"more than {self.max_repeated_lines:.0%} repeated lines"
        return None


class TokenCounter(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Counts the tokens of a text column with a Hugging Face tokenizer.

    Args:
        tokenizer: directory or hub name. Loaded once per worker.
        column: column of the text.
        output: name of the new column.
    """

    def __init__(self, tokenizer: str, column: str = "text", output: str = "num_tokens") -> None:
        self.tokenizer = tokenizer
        self.column = column
        self.output = output

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], [self.column]

    def outputs(self) -> tuple[list[str], list[str]]:
        return [], [self.output]

    def setup(self) -> None:
        import transformers

        self._tokenizer = transformers.AutoTokenizer.from_pretrained(self.tokenizer)

    def process(self, task: DocumentBatch) -> DocumentBatch:
        frame = task.to_pandas()
        texts = [value if isinstance(value, str) else "" for value in frame[self.column]]
        ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return task.with_data(frame.assign(**{self.output: [len(row) for row in ids]}))


def drop_rows(
    stage: ProcessingStage[Any, Any], task: DocumentBatch, faults: Sequence[str | None]
) -> DocumentBatch | None:
    """Drop the rows that have a fault, and report them to the run. Returns None if no row remains."""
    frame = task.to_pandas()
    for reason in dict.fromkeys(fault for fault in faults if fault is not None):
        rows = [index for index, fault in enumerate(faults) if fault == reason]
        examples = [{str(k): v for k, v in frame.iloc[index].items()} for index in rows[:MAX_EXAMPLES]]
        stage.dropped(reason, len(rows), examples)
    if all(fault is not None for fault in faults):
        return None
    return task.with_data(frame[[fault is None for fault in faults]])
