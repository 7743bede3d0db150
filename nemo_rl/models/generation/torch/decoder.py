"""What the sampling loop knows of a model: read prompts once, then one token per row and step.

    prefill(prompts, copies, num_new)      Decoding
    ───────────────────────────────►  logits of each row's next token
                                      step(tokens)   ► logits of the token after
                                      keep(rows)       drop finished rows

`make_decoder` picks the implementation: hand-written for the Llama-like families, transformers' own for the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nemo_rl.errors import WeightSyncError
from nemo_rl.utils.names import abbreviated

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class PromptBatch:
    """U prompts, padded on the *left* to P tokens, so that every row's next token falls into the same column.

    Attributes:
        input_ids: [U, P] int64.
        num_padding: [U] int64, padding tokens before each prompt; None when there are none at all.
    """

    input_ids: torch.Tensor
    num_padding: torch.Tensor | None


class Decoding(ABC):
    """B rows that are being completed. `logits` [B, V] float32 belong to each row's next token."""

    logits: torch.Tensor

    @abstractmethod
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token to each row ([B] int64); returns the new `logits`."""

    @abstractmethod
    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only ([b] int64, ascending)."""


class Decoder(ABC):
    """A model with weights, ready to complete prompts."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], tied: dict[str, str]) -> None:
        """Args: shapes of all parameters by name, tied ones once; `tied`: other name -> that name."""
        self._shapes = shapes
        self._tied = tied

    @abstractmethod
    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over weights; those from before are let go. The tensors may be shared memory and are only read.

        Raises:
            WeightSyncError: a parameter is missing, unknown, or has another shape; the old weights stay.
        """

    @abstractmethod
    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights as this decoder uses them, in the order in which they were loaded."""

    @abstractmethod
    def prefill(self, prompts: PromptBatch, copies: torch.Tensor, num_new: int) -> Decoding:
        """Read U prompts once and start B rows.

        Args:
            prompts: the prompts.
            copies: [B] int64, which prompt each row continues.
            num_new: most tokens that any row will be given.
        """

    def _checked(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        named = dict(tensors)
        missing = [name for name in self._shapes if name not in named]
        unknown = [name for name in named if name not in self._shapes and name not in self._tied]
        if missing or unknown:
            raise WeightSyncError(
                f"the published weights are not this model's: missing {abbreviated(missing)}, "
                f"unknown {abbreviated(unknown)}"
            )
        for name, shape in self._shapes.items():
            if tuple(named[name].shape) != shape:
                raise WeightSyncError(f"{name} was published with shape {tuple(named[name].shape)}, expected {shape}")
        return named


def make_decoder(config: PretrainedConfig, device: torch.device, dtype: torch.dtype, max_length: int) -> Decoder:
    """The fastest decoder for a model.

    Args:
        config: of the model.
        device: where weights and caches live.
        dtype: of the computation; logits are float32 in any case.
        max_length: longest prompt plus completion.
    """
    from nemo_rl.models.generation.torch.hf_decoder import HFDecoder
    from nemo_rl.models.generation.torch.llama_decoder import LlamaDecoder

    kind: Any = LlamaDecoder if LlamaDecoder.supports(config) else HFDecoder
    decoder: Decoder = kind(config, device, dtype, max_length)
    return decoder


def parameter_shapes(model: torch.nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by parameter name, tied parameters once under their first name, and other name -> first name."""
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
