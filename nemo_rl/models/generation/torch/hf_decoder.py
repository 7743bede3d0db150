"""Decoder for any Hugging Face causal language model, with transformers' forward pass and cache: slow, but general."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from nemo_rl.models.generation.torch.decoder import Decoder, Decoding, PromptBatch, parameter_shapes
from nemo_rl.models.routed_experts import ExpertRecorder

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class HFDecoder(Decoder):
    """Runs a transformers model whose parameters are replaced by the published tensors.

    With `records_experts`, its decodings have `experts`.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        device: torch.device,
        dtype: torch.dtype,
        max_length: int,
        *,
        records_experts: bool = False,
    ) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
        self.device = device
        self._max_length = max_length
        super().__init__(*parameter_shapes(self._model))
        self._parameters = dict(self._model.named_parameters())
        self._order: list[str] = list(self._shapes)
        self._recorder = ExpertRecorder(self._model) if records_experts else None

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        named = self._checked((name, tensor.to(self.device)) for name, tensor in tensors)
        self._order = [name for name in named if name in self._shapes]
        for name in self._order:
            # Modules keep their parameter objects (a tied one appears twice); only the data changes.
            self._parameters[name].data = named[name]

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self._order:
            yield name, self._parameters[name].data

    def prefill(self, prompts: PromptBatch, copies: torch.Tensor, num_new: int) -> Decoding:
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        mask = torch.ones_like(prompts.input_ids)
        if prompts.num_padding is not None:
            columns = torch.arange(mask.shape[1], device=self.device)
            mask = (columns >= prompts.num_padding[:, None]).long()
        decoding = HFDecoding(self._model, cache, mask, self._max_length)
        decoding.feed(prompts.input_ids)
        decoding.keep(copies)
        if self._recorder is not None:
            of_prompts = self._recorder.take().view(*prompts.input_ids.shape, -1)
            decoding.record(self._recorder, of_prompts[copies], num_new)
        return decoding


class HFDecoding(Decoding):
    """Completes rows with transformers' own cache."""

    def __init__(self, model: Any, cache: Any, mask: torch.Tensor, max_length: int) -> None:
        self._model = model
        self._max_length = max_length
        self._cache = cache
        self._mask = mask
        self._recorder: ExpertRecorder | None = None

    def record(self, recorder: ExpertRecorder, of_prompts: torch.Tensor, num_new: int) -> None:
        """Record the experts of the next tokens behind those of each row's prompt, [B, P, L * K]."""
        self._recorder = recorder
        self._column = of_prompts.shape[1]
        self._rows = torch.arange(len(of_prompts), device=of_prompts.device)  # of `experts`, still being completed
        self.experts = torch.nn.functional.pad(of_prompts, (0, 0, 0, num_new))

    def feed(self, tokens: torch.Tensor) -> None:
        """Run [B, n] tokens; `self._mask` covers them already."""
        # Rows that have ended but are not dropped yet may be beyond the last position.
        positions = (self._mask.cumsum(-1) - 1).clamp_(min=0, max=self._max_length - 1)[:, -tokens.shape[1] :]
        output = self._model(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self.logits = output.logits[:, -1].float()

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self.feed(tokens[:, None])
        if self._recorder is not None and self.experts is not None:
            self.experts[self._rows, self._column] = self._recorder.take()
            self._column += 1
        return self.logits

    def keep(self, rows: torch.Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._mask = self._mask.index_select(0, rows)
        self.logits = self.logits.index_select(0, rows)
        if self._recorder is not None:
            self._rows = self._rows[rows]
