"""The reference policy's log-probabilities of the answers in a data set, computed once per run and kept on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from nemo_rl.algorithms.preference_losses import answer_logprobs
from nemo_rl.utils.files import write_atomically

if TYPE_CHECKING:
    from nemo_rl.data.preference_batches import TokenizedPair
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

logger = logging.getLogger(__name__)

# Pairs per call of the policy, which divides them into micro-batches. Each call is followed by writing the file.
_PAIRS_PER_CALL = 512
_TENSOR, _DIGEST = "logprobs", "digest"


class ReferenceLogprobs:
    """Holds the log-probability of each answer under the reference policy, two numbers per pair.

    The same pairs are computed together in every attempt of a run, so a run that was killed repeats the values of an
    uninterrupted one to the last bit.

    Args:
        path: the file, in safetensors.
        digest: of all that the values depend on: reference model, data and options. A file with another digest is not
            used, and written again.
        pairs: the pairs of the data set, or its first ones.
        collate: makes a batch of pairs, which may have further rows at its end.
    """

    def __init__(
        self,
        path: Path,
        digest: str,
        pairs: Sequence[TokenizedPair],
        collate: Callable[[Sequence[TokenizedPair]], BatchedDataDict],
    ) -> None:
        self._path, self._digest, self._pairs, self._collate = path, digest, pairs, collate
        self._values = self._load()

    def of(self, batch: BatchedDataDict) -> torch.Tensor:
        """Return the values of the rows of a batch, [rows] float64; NaN if they have not been computed."""
        return self._values[batch["position"][::2]].flatten()

    def complete(self, positions: Sequence[int], logprobs: Callable[[BatchedDataDict], torch.Tensor]) -> None:
        """Compute the values of the pairs at `positions` that are missing.

        Args:
            positions: positions of pairs.
            logprobs: returns the reference policy's log-probabilities of a batch.
        """
        missing = [position for position in positions if self._values[position].isnan().any()]
        if missing:
            logger.info("computing the reference policy's log-probabilities of %d pairs", len(missing))
        for start in range(0, len(missing), _PAIRS_PER_CALL):
            part = missing[start : start + _PAIRS_PER_CALL]
            batch = self._collate([self._pairs[position] for position in part])
            sums = answer_logprobs(logprobs(batch), batch)
            self._values[part] = sums.view(-1, 2)[: len(part)]
            write_atomically(self._path, save({_TENSOR: self._values}, {_DIGEST: self._digest}))

    def _load(self) -> torch.Tensor:
        """Return the values in the file; NaN for all pairs if there is none that can be used."""
        unknown = torch.full((len(self._pairs), 2), torch.nan, dtype=torch.float64)
        if not self._path.exists():
            return unknown
        try:
            with safe_open(self._path, framework="pt") as file:
                digest, values = (file.metadata() or {}).get(_DIGEST), file.get_tensor(_TENSOR)
        except (OSError, SafetensorError) as error:
            logger.warning("%s cannot be read (%s) and is written again", self._path, error)
            return unknown
        if digest != self._digest or values.shape != unknown.shape:
            logger.warning("%s belongs to another reference model or to other data, and is written again", self._path)
            return unknown
        return values
