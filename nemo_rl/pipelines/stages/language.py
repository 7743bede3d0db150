"""Detects the language of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rl.errors import PipelineDefinitionError
from nemo_rl.pipelines.stage import ProcessingStage
from nemo_rl.pipelines.stages.text import drop_rows
from nemo_rl.pipelines.tasks import DocumentBatch

UNDETERMINED = "und"  # ISO 639-2
_CONFIDENCE = "_confidence"


class LanguageFilter(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Adds the language of each text with its probability, and drops rows in other languages than `keep`.

    Uses py3langid, a classifier over byte n-grams. Its wheel contains the model, so nothing is downloaded at run time.
    The stage runs in an additive venv over the driver's Python.

    Args:
        column: column of the text.
        keep: ISO 639 codes of the languages to keep, such as "en". None keeps all rows.
        min_confidence: minimum probability; below it, the language is "und". Short texts and formulas score low.
        keep_undetermined: keep rows in "und", which include rows without text. A formula has no language.
        output: column for the code. `<output>_confidence` holds the probability.
    """

    runtime_env: Mapping[str, Any] | None = {"uv": ["py3langid==0.4.0"]}

    def __init__(
        self,
        column: str = "text",
        *,
        keep: Sequence[str] | None = None,
        min_confidence: float = 0.2,
        keep_undetermined: bool = True,
        output: str = "language",
    ) -> None:
        if isinstance(keep, str) or (keep is not None and not keep):
            raise PipelineDefinitionError(f"LanguageFilter: keep={keep!r}: expected codes such as ['en'], or None")
        if not 0 <= min_confidence < 1:
            raise PipelineDefinitionError(f"LanguageFilter: min_confidence={min_confidence!r} is not in [0, 1)")
        self.column = column
        self.keep = None if keep is None else list(keep)
        self.min_confidence = min_confidence
        self.keep_undetermined = keep_undetermined
        self.output = output

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], [self.column]

    def outputs(self) -> tuple[list[str], list[str]]:
        return [], [self.output, self.output + _CONFIDENCE]

    def setup(self) -> None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        unknown = sorted(set(self.keep or []) - set(self._identifier.labels))
        if unknown:
            known = ", ".join(sorted(self._identifier.labels))
            raise PipelineDefinitionError(f"LanguageFilter: keep={unknown}: not supported by the model. Known: {known}")

    def process(self, task: DocumentBatch) -> DocumentBatch | None:
        frame = task.to_pandas()
        pairs = [self._identified(text) for text in frame[self.column]]
        columns = {
            self.output: [language for language, _ in pairs],
            self.output + _CONFIDENCE: [confidence for _, confidence in pairs],
        }
        faults = [self._fault(language) for language, _ in pairs]
        return drop_rows(self, task.with_data(frame.assign(**columns)), faults)

    def _identified(self, text: Any) -> tuple[str, float]:
        if not isinstance(text, str) or not text.strip():
            return UNDETERMINED, 0.0
        language, confidence = self._identifier.classify(text)
        return (language if confidence >= self.min_confidence else UNDETERMINED), round(confidence, 4)

    def _fault(self, language: str) -> str | None:
        if language == UNDETERMINED:
            return None if self.keep_undetermined else "language unclear"
        return None if self.keep is None or language in self.keep else f"in {language}"
