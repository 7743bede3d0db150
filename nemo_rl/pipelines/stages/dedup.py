"""Removes exact and near duplicates across an entire data set.

::

    batches ──▶ MinHashSignatures (parallel): a signature per row
            ──▶ NearDuplicateFilter (one worker, all batches in order): drops a row with a similar earlier row

The first row of each group of duplicates is kept, in the order of the input, so the result does not depend on timing.
Memory holds hashes (exact) or signatures (near), but not the texts of the data set.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nemo_rl.errors import PipelineDefinitionError
from nemo_rl.pipelines.stage import CompositeStage, GatherStage, ProcessingStage
from nemo_rl.pipelines.stages.text import drop_rows
from nemo_rl.pipelines.tasks import DocumentBatch

SIGNATURE = "_minhash"
_WORD = re.compile(r"\w+", re.UNICODE)
# A number with the sign or operator before it, or a LaTeX command. They distinguish similar problems.
_QUANTITY = re.compile(r"[-+*/^<>=]?\s*\d+|\\[a-z]+")
_DATASKETCH = {"uv": ["datasketch==1.6.5"]}


class ExactDuplicateFilter(GatherStage[DocumentBatch, DocumentBatch]):
    """Keeps the first of all rows with the same values in `columns`, over all batches.

    Args:
        columns: columns to compare.
        ignore_case_and_spaces: compare the words only, in lower case.
    """

    def __init__(self, columns: Sequence[str], *, ignore_case_and_spaces: bool = False) -> None:
        self.columns = list(columns)
        self.ignore_case_and_spaces = ignore_case_and_spaces

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], self.columns

    def process_all(self, tasks: Sequence[DocumentBatch]) -> Iterator[DocumentBatch]:
        seen: set[bytes] = set()
        for task in tasks:
            faults: list[str | None] = []
            for values in zip(*(task.to_pandas()[column] for column in self.columns)):
                key = self._key(values)
                faults.append("duplicate" if key in seen else None)
                seen.add(key)
            remaining = drop_rows(self, task, faults)
            if remaining is not None:
                yield remaining

    def _key(self, values: Sequence[Any]) -> bytes:
        texts = [value if isinstance(value, str) else repr(value) for value in values]
        if self.ignore_case_and_spaces:
            texts = [" ".join(text.lower().split()) for text in texts]
        return hashlib.blake2b("\0".join(texts).encode("utf-8", errors="replace"), digest_size=16).digest()


class NearDuplicates(CompositeStage[DocumentBatch, DocumentBatch]):
    """Keeps the first of all rows whose texts are nearly the same. Uses datasketch's MinHash with an LSH index.

    A text without words (only symbols, or missing) has no near duplicates and is kept.

    Args:
        column: column of the text.
        threshold: minimum Jaccard similarity of the word shingles of two near duplicates.
        shingle_words: words per shingle.
        num_permutations: length of a signature. Longer signatures estimate the similarity more precisely.
        protect_numbers: keep both texts if their numbers, signs or LaTeX commands differ. Two different problems may
            differ in one number only.
    """

    def __init__(
        self,
        column: str,
        *,
        threshold: float = 0.8,
        shingle_words: int = 3,
        num_permutations: int = 128,
        protect_numbers: bool = False,
    ) -> None:
        if not 0 < threshold < 1:
            raise PipelineDefinitionError(f"NearDuplicates: threshold must be between 0 and 1, not {threshold!r}")
        self._parts = [
            MinHashSignatures(column, shingle_words, num_permutations),
            NearDuplicateFilter(column, threshold, num_permutations, protect_numbers),
        ]

    def decompose(self) -> list[Any]:
        return list(self._parts)


class MinHashSignatures(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Adds a MinHash signature per row. See `NearDuplicates`."""

    runtime_env: Mapping[str, Any] | None = _DATASKETCH

    def __init__(self, column: str, shingle_words: int, num_permutations: int) -> None:
        self.column = column
        self.shingle_words = shingle_words
        self.num_permutations = num_permutations

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], [self.column]

    def outputs(self) -> tuple[list[str], list[str]]:
        return [], [SIGNATURE]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        from datasketch import MinHash

        frame = task.to_pandas()
        shingles = [self._shingles(text) for text in frame[self.column]]
        hashes = MinHash.bulk(shingles, num_perm=self.num_permutations, seed=1)
        signatures = [one.hashvalues.astype(np.uint64).tobytes() for one in hashes]
        return task.with_data(frame.assign(**{SIGNATURE: signatures}))

    def _shingles(self, text: Any) -> list[bytes]:
        words = _WORD.findall(text.lower()) if isinstance(text, str) else []
        size = self.shingle_words
        return [" ".join(words[i : i + size]).encode() for i in range(max(1, len(words) - size + 1))]


class NearDuplicateFilter(GatherStage[DocumentBatch, DocumentBatch]):
    """Drops rows that are near duplicates of an earlier row. See `NearDuplicates`."""

    runtime_env: Mapping[str, Any] | None = _DATASKETCH

    def __init__(self, column: str, threshold: float, num_permutations: int, protect_numbers: bool) -> None:
        self.column = column
        self.threshold = threshold
        self.num_permutations = num_permutations
        self.protect_numbers = protect_numbers

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], [self.column, SIGNATURE]

    def process_all(self, tasks: Sequence[DocumentBatch]) -> Iterator[DocumentBatch]:
        from datasketch import MinHash, MinHashLSH

        index = MinHashLSH(threshold=self.threshold, num_perm=self.num_permutations)
        first: dict[int, tuple[np.ndarray, str]] = {}
        number = 0
        for task in tasks:
            faults: list[str | None] = []
            frame = task.to_pandas()
            for text, signature in zip(frame[self.column], frame[SIGNATURE]):
                values = np.frombuffer(signature, dtype=np.uint64)
                minhash = MinHash(num_perm=self.num_permutations, seed=1, hashvalues=values)
                if not isinstance(text, str) or _WORD.search(text) is None:  # all such texts have the same signature
                    faults.append(None)
                    continue
                numbers = _quantities(text) if self.protect_numbers else ""
                near = any(
                    first[other][1] == numbers and np.mean(first[other][0] == values) >= self.threshold
                    for other in index.query(minhash)
                )
                faults.append("near duplicate" if near else None)
                if not near:
                    index.insert(number, minhash)
                    first[number] = (values, numbers)
                    number += 1
            remaining = drop_rows(self, task.with_data(frame.drop(columns=[SIGNATURE])), faults)
            if remaining is not None:
                yield remaining


def _quantities(text: str) -> str:
    """Return the numbers, the signs before them and the LaTeX commands of a text, in order."""
    return " ".join("".join(match.split()) for match in _QUANTITY.findall(text.lower()))
