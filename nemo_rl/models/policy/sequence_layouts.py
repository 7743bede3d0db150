"""Layouts of several sequences in one row of tokens: end to end, or with their common prefixes only once.

The completions of a prompt share its tokens. Under causal attention, the hidden states of a prompt do not depend on
what follows, so that one copy of them is enough::

    padded    [ prompt A | completion 1 | padding ]      shared    [ prompt A | prompt B | c1 | c2 | c3 | c4 ]
              [ prompt A | completion 2           ]                c1, c2 attend to themselves and to prompt A,
              [ prompt B | completion 3 | padding ]                c3, c4 to themselves and to prompt B
              [ prompt B | completion 4 | padding ]

Losses and gradients are the same, up to the order of additions.

TorchScript reads annotations as types, so this module has no `from __future__ import annotations`.
"""

from typing import NamedTuple

import torch

# Sharing prefixes costs additional operations per layer. It must save at least this part of the tokens.
_MIN_SAVED = 0.1
# Most elements of the mask of all continuations (64 MiB), which differs between them if prefixes have several lengths.
_MAX_MASK = 2**26


class PaddedSequences(NamedTuple):
    """Where the T tokens of a row, sequence after sequence, stand in a padded batch of its N sequences.

    Attributes:
        sequence, position: [T] int64.
        num_sequences: N.
        longest: L, the number of tokens of the longest sequence.
    """

    sequence: torch.Tensor
    position: torch.Tensor
    num_sequences: int
    longest: int


class SharedPrefixes(NamedTuple):
    """A row with G different prefixes of P tokens in all, then N continuations, each of one of the prefixes.

    Attributes:
        prefixes: the first P tokens of the row, [G, P'] as a padded batch.
        continuations: the other tokens, [N, L] as a padded batch; None if no prefix has a continuation.
        prefix: [N] int64, the prefix of each continuation.
        mask: [N or 1, 1, L, P' + L] bool, the tokens of its prefix and of itself that each token of a continuation
            attends to.
    """

    prefixes: PaddedSequences
    continuations: PaddedSequences | None
    prefix: torch.Tensor
    mask: torch.Tensor


class SharedRow(NamedTuple):
    """The tokens of a micro-batch in the layout of `SharedPrefixes`, and where the scored tokens are.

    Attributes:
        layout: where the C tokens belong.
        input_ids, position_ids: [1, C] int64.
        logits: [K] int64, for each scored token the position in the row whose logits predict it.
        rows, positions: [K] int64, the scored tokens in the micro-batch.
    """

    layout: SharedPrefixes
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    logits: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor


def share_prefixes(input_ids: torch.Tensor, wanted: torch.Tensor) -> SharedRow | None:
    """Lay out a micro-batch on the CPU so that the tokens before the first scored one are computed once.

    Args:
        input_ids: [b, T] int64.
        wanted: [b, T] bool, the tokens to score; False at position 0.

    Returns:
        The row; None if it would save too little.
    """
    used = wanted.any(dim=1).nonzero()[:, 0]
    if len(used) < 2:
        return None
    tokens, scored = input_ids[used], wanted[used]
    width = tokens.shape[1]
    first = scored.int().argmax(dim=1)
    last = width - 1 - scored.flip(1).int().argmax(dim=1)
    # The logits for token t are those of position t - 1, so the last token of a row is never an input.
    lengths = last - first
    owner, prefix = _distinct_prefixes(tokens, first)
    prefix_lengths = first[owner]
    longest = int(lengths.max())
    if len(used) * longest * (int(prefix_lengths.max()) + longest) > _MAX_MASK:
        return None
    num_tokens = int(prefix_lengths.sum() + lengths.sum())
    if num_tokens > (1 - _MIN_SAVED) * int(last.sum()):
        return None

    position = torch.arange(width)
    prefixes = _padded(prefix_lengths)
    in_prefix = position < prefix_lengths[:, None]
    in_continuation = (position >= first[:, None]) & (position < last[:, None])
    continued = lengths > 0
    continuations = _padded(lengths[continued]) if bool(continued.any()) else None
    layout = SharedPrefixes(
        prefixes,
        continuations,
        prefix[continued],
        _mask(
            prefix_lengths, prefix[continued], prefixes.longest, 0 if continuations is None else continuations.longest
        ),
    )
    ids = torch.cat([tokens[owner][in_prefix], tokens[in_continuation]])
    positions = torch.cat([position.expand(len(owner), -1)[in_prefix], position.expand(len(used), -1)[in_continuation]])

    rows, columns = scored.nonzero(as_tuple=True)
    start = len(prefixes.position) + lengths.cumsum(0) - lengths
    offset = columns - 1 - first[rows]
    end_of_prefix = prefix_lengths.cumsum(0)[prefix[rows]] - 1
    logits = torch.where(offset < 0, end_of_prefix, start[rows] + offset)
    return SharedRow(layout, ids[None], positions[None], logits, used[rows], columns)


def _distinct_prefixes(input_ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a row with each distinct prefix, [G], and the prefix of each row, [b]."""
    numbers: dict[bytes, int] = {}
    owners: list[int] = []
    prefix: list[int] = []
    for row, (ids, length) in enumerate(zip(input_ids.numpy(), lengths.tolist(), strict=True)):
        number = numbers.setdefault(ids[:length].tobytes(), len(numbers))
        if number == len(owners):
            owners.append(row)
        prefix.append(number)
    return torch.tensor(owners), torch.tensor(prefix)


def _padded(lengths: torch.Tensor) -> PaddedSequences:
    longest = int(lengths.max())
    inside = torch.arange(longest) < lengths[:, None]
    sequence, position = inside.nonzero(as_tuple=True)
    return PaddedSequences(sequence, position, len(lengths), longest)


def _mask(prefix_lengths: torch.Tensor, prefix: torch.Tensor, width: int, length: int) -> torch.Tensor:
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    if bool((prefix_lengths == width).all()):
        return torch.cat([torch.ones(length, width, dtype=torch.bool), causal], dim=1)[None, None]
    of_prefix = (torch.arange(width) < prefix_lengths[prefix][:, None])[:, None].expand(-1, length, -1)
    return torch.cat([of_prefix, causal.expand(len(prefix), -1, -1)], dim=2)[:, None]
