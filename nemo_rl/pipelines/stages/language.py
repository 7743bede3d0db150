"""Which language a text is in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rl.errors import PipelineDefinitionError
from nemo_rl.pipelines.stage import ProcessingStage
from nemo_rl.pipelines.stages.text import kept
from nemo_rl.pipelines.tasks import DocumentBatch

UNDETERMINED = "und"  # ISO 639-2
_CONFIDENCE = "_confidence"


class LanguageFilter(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Adds each text's language and how sure that is, and drops the rows in languages that are not wanted.

    By py3langid, a classifier over byte n-grams whose wheel holds its model: nothing is downloaded while it runs. It is
    in a venv of its own, laid over the driver's Python.

    Args:
        column: the text.
        keep: ISO 639 codes of the languages that stay, such as "en"; None: all stay, and the column tells.
        min_confidence: a probability; below it the language is "und". Short texts and formulas come out low.
        keep_undetermined: whether rows in "und", also those without a text, stay. A formula has no language.
        output: column for the code; `<output>_confidence` gets the probability.
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
            raise PipelineDefinitionError(
                f"LanguageFilter: keep={unknown}: the model does not know them. Known: {known}"
            )

    def process(self, task: DocumentBatch) -> DocumentBatch | None:
        frame = task.to_pandas()
        found = [self._identified(text) for text in frame[self.column]]
        added = {
            self.output: [language for language, _ in found],
            self.output + _CONFIDENCE: [confidence for _, confidence in found],
        }
        return kept(self, task.with_data(frame.assign(**added)), [self._fault(language) for language, _ in found])

    def _identified(self, text: Any) -> tuple[str, float]:
        if not isinstance(text, str) or not text.strip():
            return UNDETERMINED, 0.0
        language, confidence = self._identifier.classify(text)
        return (language if confidence >= self.min_confidence else UNDETERMINED), round(confidence, 4)

    def _fault(self, language: str) -> str | None:
        if language == UNDETERMINED:
            return None if self.keep_undetermined else "language unclear"
        return None if self.keep is None or language in self.keep else f"in {language}"
