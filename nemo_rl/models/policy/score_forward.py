"""The forward pass of a reward model from a micro-batch to the reward of each conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import ModelError
from nemo_rl.models.policy.hf_loading import SCORE_LAYER
from nemo_rl.models.policy.logprob_forward import check_packing
from nemo_rl.models.policy.parallel_model import ParallelModel


class ScoreForward:
    """Computes the rewards of micro-batches: the score at the last token of each conversation.

    transformers' models score every token, and then select one by the padding token. The scores are taken before that,
    so that conversations can be packed.

    Args:
        model: a model for sequence classification with one label; the pass uses its precision and its sharding.
        packed: lay the conversations of a micro-batch end to end.

    Raises:
        ModelError: the model has no score layer, or with `packed` it lets packed sequences attend to each other.
    """

    def __init__(self, model: ParallelModel, *, packed: bool) -> None:
        self._model, self._packed = model, packed
        self._hidden: torch.Tensor | None = None
        self._scores: torch.Tensor | None = None
        layer = getattr(model.module, SCORE_LAYER, None)
        if not isinstance(layer, nn.Module):
            raise ModelError(f"{type(model.module).__name__} has no layer {SCORE_LAYER!r} that scores every token")
        layer.register_forward_hook(self._keep)
        if packed:
            check_packing(model, self._relative_hidden)

    def train(
        self,
        parts: Iterable[BatchedDataDict],
        loss: Callable[[torch.Tensor, BatchedDataDict], torch.Tensor],
    ) -> None:
        """Run forward and backward passes; then every gradient is the sum over micro-batches and ranks. A collective.

        Args:
            parts: micro-batches, on any device.
            loss: computes the loss from the [b] rewards and the micro-batch.
        """
        for part in parts:
            part = part.to(self._model.device)
            loss(self._run(part, self._packed), part).backward()
        self._model.reduce_gradients()

    def scores(self, parts: Iterable[BatchedDataDict]) -> Iterator[torch.Tensor]:
        """Yield the [b] float32 rewards of each micro-batch, without gradient."""
        for part in parts:
            with torch.no_grad():
                yield self._run(part.to(self._model.device), self._packed)

    def logprobs(self, parts: Iterable[BatchedDataDict]) -> Iterator[torch.Tensor]:
        """Raise `ModelError`: a reward model has no log-probabilities."""
        raise ModelError("a reward model computes rewards of conversations and no log-probabilities of tokens")

    def _run(self, batch: BatchedDataDict, packed: bool) -> torch.Tensor:
        last = self._call(batch, packed)
        assert self._scores is not None
        scores, self._scores = self._scores, None
        return scores[..., 0][last].float()

    def _call(self, batch: BatchedDataDict, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Call the model; return the indices of the last token of each conversation among the scores."""
        ids, lengths = batch["input_ids"], batch["input_lengths"]
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        options: dict[str, Any] = {}
        rows, last = torch.arange(len(ids), device=ids.device), lengths - 1
        if packed:
            inside = position < lengths[:, None]
            ids, options["position_ids"] = ids[inside][None], position[inside][None]
            rows, last = torch.zeros_like(rows), lengths.cumsum(0) - 1
        with self._model.precision():
            self._model.module(input_ids=ids, use_cache=False, **options)
        return rows, last

    def _keep(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...], scores: torch.Tensor) -> None:
        self._scores = scores
        self._hidden = None if torch.is_grad_enabled() else inputs[0]

    def _relative_hidden(self, batch: BatchedDataDict, packed: bool) -> torch.Tensor:
        """Return the last hidden states of conversations. Scores, which may all be 0, would not show a difference."""
        last = self._call(batch, packed)
        assert self._hidden is not None
        hidden = self._hidden[last].float()
        return hidden / hidden.abs().max()
