"""The decoder interface: the model as the sampling loop sees it.

    prefill(prompts, copies, num_new)      Decoding
    ───────────────────────────────►  logits of each row's next token
                                      step_and_draw(tokens)   ► the following token of each row
                                      keep(rows)       drop finished rows

A decoder reads each prompt once, then appends one token per row and step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.generation.sampling import Drawn, Sampler
from nemo_rl.models.generation.weight_names import check_weight_names


@dataclass(frozen=True)
class PromptBatch:
    """Holds U prompts, padded on the *left* to P tokens, so that every row's next token falls into the same column.

    Attributes:
        input_ids: [U, P] int64.
        num_padding: [U] int64, padding tokens before each prompt. None: no prompt has padding.
    """

    input_ids: torch.Tensor
    num_padding: torch.Tensor | None


class Decoding(ABC):
    """Completes B rows step by step. `logits` [B, V] float32 belong to each row's next token.

    Attributes:
        experts: [B, P + num_new, L * K] int16: the experts of every token that was read, in the columns of the padded
            prompts and after them, for all rows from the start; see `models.routed_experts`. None if not recorded.
    """

    logits: torch.Tensor
    experts: torch.Tensor | None = None

    @abstractmethod
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token to each row ([B] int64); returns the new `logits`."""

    def step_and_draw(
        self, tokens: torch.Tensor, sampler: Sampler, uniforms: torch.Tensor, stop_ids: torch.Tensor
    ) -> Drawn:
        """Append one token to each row and draw the next ones.

        Args:
            tokens: [B] int64.
            sampler: draws.
            uniforms: [B] float64 in (0, 1), for the draw.
            stop_ids: [S] int64, tokens that the result may report as `has_stop`.
        """
        return sampler.draw(self.step(tokens), uniforms)

    @abstractmethod
    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows ([b] int64, ascending) and drop the others."""


class Decoder(ABC):
    """Holds a model's weights and starts decodings.

    Args:
        shapes: Shapes of all parameters by name; tied parameters appear once.
        tied: Other name of a tied parameter -> its name in `shapes`.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], tied: dict[str, str]) -> None:
        self._shapes = shapes
        self._tied = tied

    @property
    def runs_without_interpreter(self) -> bool:
        """Whether `step_and_draw` of several decodings runs at the same time in several threads of this process."""
        return False

    @property
    def num_parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(math.prod(shape) for shape in self._shapes.values())

    @abstractmethod
    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights. The tensors may be shared memory, so they are only read.

        Raises:
            WeightSyncError: A parameter is missing, unknown or has another shape. The old weights stay.
        """

    @abstractmethod
    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the weights that this decoder computes with, in the order in which they were loaded."""

    @abstractmethod
    def prefill(self, prompts: PromptBatch, copies: torch.Tensor, num_new: int) -> Decoding:
        """Read U prompts once and start B rows.

        Args:
            prompts: The prompts.
            copies: [B] int64, the prompt that each row continues.
            num_new: Most tokens that are appended to a row.
        """

    def _checked(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the tensors by name. Raises `WeightSyncError` unless they are the model's parameters."""
        named = dict(tensors)
        check_weight_names(self._shapes, named, self._tied)
        for name, shape in self._shapes.items():
            if tuple(named[name].shape) != shape:
                raise WeightSyncError(f"{name} was published with shape {tuple(named[name].shape)}, expected {shape}")
        return named


def parameter_shapes(model: torch.nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return shapes by parameter name, tied parameters once under their first name, and other name -> first name."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
            shapes[name] = tuple(parameter.shape)
    return shapes, tied
