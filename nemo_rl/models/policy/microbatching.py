"""Splits a worker's shard of a batch into micro-batches, and lays out the model's inputs.

There are three layouts of the inputs::

    padded   one row per sequence, padded on the right to the longest of the micro-batch. No attention mask is
             needed: under causal attention no token attends to the padding behind it.
    packed   all sequences end to end in one row. Positions restart at 0 with each sequence; from them
             transformers derives a block-diagonal causal mask (or the sequence bounds of flash attention).
    shared   packed, with each distinct prompt only once, before all completions; see `sequence_layouts`. Attention must
             know this layout (`cpu_kernels`).

Logits are computed only where a log-probability is needed, as far as the model supports it (it selects columns of the
input), because with a large vocabulary they are the largest tensor of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import DataError
from nemo_rl.models.policy.config import BatchingConfig
from nemo_rl.models.policy.sequence_layouts import SharedPrefixes, SharedRow, share_prefixes

# Log-probabilities of a micro-batch (see `LossFunction`), and the micro-batch -> a scalar loss with gradient.
MicrobatchLoss = Callable[[torch.Tensor, BatchedDataDict], torch.Tensor]


def sharding_args(batching: BatchingConfig) -> dict[str, Any]:
    """Return the arguments with which `BatchedDataDict.shard_by_batch_size` plans micro-batches for this mode."""
    if batching.mode == "dynamic":
        args = {"max_tokens_per_microbatch": batching.max_tokens, "sequence_length_round": batching.length_multiple}
        return {"dynamic_batching_args": args}
    if batching.mode == "packed":
        args = {
            "max_tokens_per_microbatch": batching.max_tokens,
            "sequence_length_pad_multiple": batching.length_multiple,
        }
        return {"sequence_packing_args": args}
    return {}


def global_batches(shard: BatchedDataDict, local_batch_size: int | None) -> list[BatchedDataDict]:
    """Split a worker's rows into optimizer steps: by their plan, else `local_batch_size` rows each (None: one step).

    Raises:
        DataError: the rows do not divide.
    """
    plan = shard.microbatch_plan
    if plan is not None:
        return [shard.get_batch(index) for index in range(len(plan.batches))]
    size = local_batch_size or shard.size
    if not size or shard.size % size:
        raise DataError(f"{shard.size} samples of a worker cannot be divided into optimizer batches of {size}")
    return [shard.get_batch(index, size) for index in range(shard.size // size)]


def microbatches(shard: BatchedDataDict, size: int, length_multiple: int = 1) -> Iterator[BatchedDataDict]:
    """Yield the micro-batches of a shard: those of its plan, else `size` rows each (the last may have fewer).

    Every tensor with the width of `input_ids` is truncated to the longest sequence of the micro-batch, rounded up to a
    multiple of `length_multiple`.
    """
    plan = shard.microbatch_plan
    if plan is not None and not plan.packed:
        yield from shard.make_microbatch_iterator_with_dynamic_shapes()
        return
    if plan is not None:
        parts: Iterator[BatchedDataDict] = shard.make_microbatch_iterator_for_packable_sequences()
    else:
        rows = shard.size
        parts = (shard.slice(start, min(start + size, rows)) for start in range(0, rows, size))
    for part in parts:
        width = part["input_ids"].shape[1]
        longest = max(int(part["input_lengths"].max()), 1)
        length = min(-(-longest // length_multiple) * length_multiple, width)
        for key, value in part.items():
            if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[1] == width:
                part[key] = value.narrow(1, 0, length)
        yield part


@dataclass(frozen=True)
class ModelInputs:
    """Inputs of one forward pass over [R, C] tokens that yields K logits per row, and their positions in the result.

    With shared prefixes, the input is one packed row without `inside`.

    Attributes:
        input_ids: [R, C] int64.
        position_ids: [R, C] int64 if packed, else None (0, 1, 2, ...).
        logits_to_keep: as in transformers: K, the number of last columns, or int64 [K], the columns.
        tokens: [R * K] int64, the token to score at each logit.
        rows, positions: packed only: int64 [K], indices of each log-probability in the [b, T] result.
        first: padded only: position in the result of the first kept column.
        valid: [b, T] bool, False where the result is 0 (position 0, padding).
        inside: packed only: [b, T] bool, True for the tokens of `input_ids`, row by row.
        shared_prefixes: how prefixes are shared in the packed row; None if they are not.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    logits_to_keep: int | torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor | None
    positions: torch.Tensor | None
    first: int
    valid: torch.Tensor
    inside: torch.Tensor | None = None
    shared_prefixes: SharedPrefixes | None = None

    def scatter(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Scatter [R * K] log-probabilities to [b, T], with 0 elsewhere; [R * K, D] to [b, T, D]. Differentiable."""
        (batch_size, width), sizes = self.valid.shape, logprobs.shape[1:]
        if self.rows is not None and self.positions is not None:
            result = logprobs.new_zeros(batch_size, width, *sizes).index_put((self.rows, self.positions), logprobs)
        else:
            columns = logprobs.view(batch_size, -1, *sizes)
            result = F.pad(columns, (0, 0) * len(sizes) + (self.first, width - self.first - columns.shape[1]))
        return result.masked_fill(~self.valid.view(batch_size, width, *(1 for _ in sizes)), 0)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values at the tokens to score: of [b, T, D], the [R * K, D] that `scatter` would put there."""
        if self.rows is not None and self.positions is not None:
            return values[self.rows, self.positions]
        assert isinstance(self.logits_to_keep, int), "padded inputs keep the last columns"
        return values[:, self.first : self.first + self.logits_to_keep].flatten(0, 1)

    def at_inputs(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values of the model's inputs: of [b, T, D], the [R, C, D] at `input_ids`."""
        return values[:, : self.input_ids.shape[1]] if self.inside is None else values[self.inside][None]


def model_inputs(
    batch: BatchedDataDict, *, packed: bool, only_loss_tokens: bool, shares_prefixes: bool = False
) -> ModelInputs:
    """Lay out the inputs for the log-probabilities of a micro-batch.

    Args:
        batch: `input_ids` [b, T], `input_lengths` [b], and with `only_loss_tokens` `token_mask` [b, T].
        packed: lay the sequences end to end in one row.
        only_loss_tokens: skip logits of tokens outside `token_mask`, where the result is 0. In the padded layout a
            column is skipped only if no sample needs it.
        shares_prefixes: compute common prefixes once where that saves enough, on a CPU.

    Raises:
        DataError: the lengths do not fit `input_ids`.
    """
    input_ids, lengths = batch["input_ids"], batch["input_lengths"]
    batch_size, width = input_ids.shape
    if not 0 < int(lengths.min()) <= int(lengths.max()) <= width:
        raise DataError(
            f"input_lengths from {int(lengths.min())} to {int(lengths.max())} do not fit input_ids of shape "
            f"{[batch_size, width]}: every sample must have at least one token"
        )
    position = torch.arange(width, device=input_ids.device)
    valid = (position < lengths[:, None]) & (position > 0)
    wanted = valid & (batch["token_mask"] > 0) if only_loss_tokens else valid
    shared = share_prefixes(input_ids, wanted) if shares_prefixes else None
    if shared is not None:
        return _shared(input_ids, wanted, shared)
    return _packed(input_ids, lengths, wanted) if packed else _padded(input_ids, valid, wanted)


def _padded(input_ids: torch.Tensor, valid: torch.Tensor, wanted: torch.Tensor) -> ModelInputs:
    columns = wanted.any(dim=0).nonzero().view(-1)
    # If no logits are needed, one column is computed and masked: under FSDP other ranks wait in the forward pass.
    first = int(columns[0]) if len(columns) else min(1, input_ids.shape[1] - 1)
    last = int(columns[-1]) if len(columns) else first
    return ModelInputs(
        # The logits for token t are those of column t - 1: the last token is never an input.
        input_ids=input_ids[:, : max(last, 1)],
        position_ids=None,
        logits_to_keep=last - first + 1,
        tokens=input_ids[:, first : last + 1].reshape(-1),
        rows=None,
        positions=None,
        first=first,
        valid=valid,
    )


def _packed(input_ids: torch.Tensor, lengths: torch.Tensor, wanted: torch.Tensor) -> ModelInputs:
    batch_size, width = input_ids.shape
    used = (lengths - 1).clamp(min=1)
    starts = used.cumsum(0) - used
    position = torch.arange(width, device=input_ids.device).expand(batch_size, width)
    inside = position < used[:, None]
    rows, positions = wanted.nonzero(as_tuple=True)
    if not len(rows):
        rows, positions = rows.new_zeros(1), positions.new_zeros(1)
    return ModelInputs(
        input_ids=input_ids[inside][None],
        position_ids=position[inside][None],
        logits_to_keep=(starts[rows] + positions - 1).clamp(min=0),
        tokens=input_ids[rows, positions],
        rows=rows,
        positions=positions,
        first=0,
        valid=wanted,
        inside=inside,
    )


def _shared(input_ids: torch.Tensor, wanted: torch.Tensor, row: SharedRow) -> ModelInputs:
    return ModelInputs(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        logits_to_keep=row.logits,
        tokens=input_ids[row.rows, row.positions],
        rows=row.rows,
        positions=row.positions,
        first=0,
        valid=wanted,
        shared_prefixes=row.layout,
    )
