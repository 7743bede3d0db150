"""A pipeline stage: cut texts to a length."""

from __future__ import annotations

from nemo_rl.pipelines.stage import ProcessingStage
from nemo_rl.pipelines.tasks import DocumentBatch


class Shorten(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Keeps the first `length` characters of the column `text`."""

    def __init__(self, length: int) -> None:
        self.length = length

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], ["text"]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        frame = task.to_pandas()
        frame["text"] = frame["text"].str.slice(0, self.length)
        task.data = frame
        return task
