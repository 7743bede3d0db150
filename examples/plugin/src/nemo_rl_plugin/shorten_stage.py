"""A pipeline stage that shortens texts, with a package that only this stage has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_rl.pipelines import DocumentBatch, ProcessingStage


class Shorten(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Shortens the column `text` and adds its width. Drops empty texts."""

    runtime_env: Mapping[str, Any] | None = {"uv": ["wcwidth==0.2.14"]}

    def __init__(self, num_words: int) -> None:
        self.num_words = num_words

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], ["text"]  # attributes of the task, columns of its data

    def outputs(self) -> tuple[list[str], list[str]]:
        return ["data"], ["width"]

    def setup(self) -> None:
        import wcwidth  # installed only in the Python of this stage

        self._width = wcwidth.wcswidth

    def process(self, task: DocumentBatch) -> DocumentBatch | None:
        frame = task.to_pandas()
        kept = frame[frame["text"].str.strip() != ""]
        self.dropped("empty text", len(frame) - len(kept))
        text = kept["text"].str.split().str[: self.num_words].str.join(" ")
        return task.with_data(kept.assign(text=text, width=text.map(self._width)))
