"""A decoder in plain torch for Llama-like models: no modules, no hooks, no copies of the weights.

For a model of laptop size a step consists of dozens of tiny operations, so their number determines the time. q, k, v
are one matrix product, and so are gate, up: their weights are adjacent in the published buffer, so the fused weight is
a view. The product before a residual connection also adds the residual. Attention over a group of query heads is one
batched product with the group as rows, so keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from nemo_rl.models.generation.linear import linear_ops, scripted_linear_ops
from nemo_rl.models.generation.sampling import Drawn, Sampler
from nemo_rl.models.generation.torch.decoder import Decoder, Decoding, PromptBatch, parameter_shapes
from nemo_rl.models.generation.torch.kv_cache import KVCache
from nemo_rl.models.generation.torch.llama_layers import (
    DecodingState,
    LayerWeights,
    LlamaConstants,
    LlamaFunctions,
    LlamaWeights,
    llama_functions,
)
from nemo_rl.models.torchscript import compiled_or_plain

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """How a model family differs from Llama. Biases need no entry: they are used if the weights contain them."""

    qk_norm: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "qwen2": Family(),
    "qwen3": Family(qk_norm=True),
}
_STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})


class LlamaDecoder(Decoder):
    """Decodes Llama, Qwen2 and dense Qwen3 models."""

    @staticmethod
    def supports(config: PretrainedConfig) -> bool:
        """Return whether this file computes exactly this model."""
        rope = getattr(config, "rope_parameters", None) or {}
        layer_types = getattr(config, "layer_types", None) or ["full_attention"]
        return (
            config.model_type in FAMILIES
            and getattr(config, "hidden_act", None) == "silu"
            and rope.get("rope_type", "default") in _STATIC_ROPE
            and rope.get("partial_rotary_factor", 1.0) == 1.0
            and not getattr(config, "use_sliding_window", False)
            and set(layer_types) == {"full_attention"}
        )

    def __init__(self, config: PretrainedConfig, device: torch.device, dtype: torch.dtype, max_length: int) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        with torch.device("meta"):
            super().__init__(*parameter_shapes(AutoModelForCausalLM.from_config(config)))
        self.device, self.dtype = device, dtype
        self._functions, self._is_compiled = _make_functions(device, dtype)
        self.num_layers: int = config.num_hidden_layers
        num_heads: int = config.num_attention_heads
        head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        eps: float = config.rms_norm_eps
        floors = [torch.tensor((size * eps) ** 0.5, device=device) for size in (config.hidden_size, head_dim)]
        num_kv_heads: int = getattr(config, "num_key_value_heads", None) or num_heads
        self._family = FAMILIES[config.model_type]
        positions = torch.arange(max_length)[None]
        rotary: Any = LlamaRotaryEmbedding(cast(Any, config))
        cos, sin = rotary(torch.zeros(1), positions)
        half = head_dim // 2
        signed = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        tables = [table.to(device, dtype) for table in (cos[0], signed)]
        self.constants = LlamaConstants(num_heads, num_kv_heads, head_dim, eps, (floors[0], floors[1]), *tables)
        self._tensors: dict[str, torch.Tensor] = {}
        self._weights: LlamaWeights | None = None

    @property
    def runs_without_interpreter(self) -> bool:
        return self._is_compiled

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        named = self._checked((name, tensor.to(self.device)) for name, tensor in tensors)
        layers = [self._layer(named, f"model.layers.{index}.") for index in range(self.num_layers)]
        embedding = named["model.embed_tokens.weight"]
        self._weights = LlamaWeights(
            embedding, layers, named["model.norm.weight"], named.get("lm_head.weight", embedding)
        )
        self._tensors = named

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._tensors.items()

    def _layer(self, tensors: dict[str, torch.Tensor], prefix: str) -> LayerWeights:
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        projections = [f"{attention}{name}_proj." for name in "qkv"]
        gates = [f"{mlp}{name}_proj." for name in ("gate", "up")]
        return LayerWeights(
            input_norm=tensors[f"{prefix}input_layernorm.weight"],
            qkv=_fuse(tensors, [f"{name}weight" for name in projections]),
            qkv_bias=_fuse_if_present(tensors, [f"{name}bias" for name in projections]),
            q_norm=tensors[f"{attention}q_norm.weight"] if self._family.qk_norm else None,
            k_norm=tensors[f"{attention}k_norm.weight"] if self._family.qk_norm else None,
            out=tensors[f"{attention}o_proj.weight"],
            out_bias=tensors.get(f"{attention}o_proj.bias"),
            mlp_norm=tensors[f"{prefix}post_attention_layernorm.weight"],
            gate_up=_fuse(tensors, [f"{name}weight" for name in gates]),
            gate_up_bias=_fuse_if_present(tensors, [f"{name}bias" for name in gates]),
            down=tensors[f"{mlp}down_proj.weight"],
            down_bias=tensors.get(f"{mlp}down_proj.bias"),
        )

    def prefill(self, prompts: PromptBatch, copies: torch.Tensor, num_new: int) -> Decoding:
        assert self._weights is not None, "prefill before load"
        width = prompts.input_ids.shape[1]
        cache = KVCache(
            self.num_layers,
            len(copies),
            self.constants.num_kv_heads,
            width + num_new,
            self.constants.head_dim,
            device=self.device,
            dtype=self.dtype,
        )
        logits = self._functions.prefill(
            prompts.input_ids, prompts.num_padding, copies, self._weights, cache.layers, self.constants
        )
        padding = None if prompts.num_padding is None else prompts.num_padding.index_select(0, copies)
        return LlamaDecoding(self, cache, logits.index_select(0, copies), width, padding)

    def step(self, tokens: torch.Tensor, decoding: LlamaDecoding) -> torch.Tensor:
        """Append one token per row; returns logits [B, V]."""
        return self._functions.step(tokens, self._state(decoding))

    def step_and_draw(
        self,
        tokens: torch.Tensor,
        decoding: LlamaDecoding,
        sampler: Sampler,
        uniforms: torch.Tensor,
        stop_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, Drawn]:
        """Append one token per row and draw the next ones; returns the logits, too."""
        logits, drawn, logprobs, sampling_logprobs, has_stop = self._functions.step_and_draw(
            tokens, self._state(decoding), uniforms, sampler.temperature, sampler.greedy, stop_ids
        )
        return logits, Drawn(drawn, logprobs, sampling_logprobs, has_stop)

    def _state(self, decoding: LlamaDecoding) -> DecodingState:
        assert self._weights is not None
        cache = decoding.cache.layers
        return DecodingState(self._weights, self.constants, cache, decoding.column, decoding.num_padding, decoding.mask)


class LlamaDecoding(Decoding):
    """Completes rows in a static cache; all rows are at the same column."""

    def __init__(
        self,
        decoder: LlamaDecoder,
        cache: KVCache,
        logits: torch.Tensor,
        column: int,
        num_padding: torch.Tensor | None,
    ) -> None:
        self._decoder = decoder
        self.cache = cache
        self.logits = logits
        self.column = column
        self.num_padding = num_padding
        self.mask: torch.Tensor | None = None
        self._make_mask()

    def _make_mask(self) -> None:
        """Set `mask` to [B * kv_heads, 1, columns]: minus infinity at padding, else 0."""
        if self.num_padding is None:
            return
        columns = torch.arange(self.cache.num_columns, device=self.num_padding.device)
        hidden = columns < self.num_padding.repeat_interleave(self._decoder.constants.num_kv_heads)[:, None]
        mask = torch.zeros(hidden.shape, device=hidden.device, dtype=self._decoder.dtype)
        self.mask = mask.masked_fill_(hidden, float("-inf"))[:, None]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.logits = self._decoder.step(tokens, self)
        self.column += 1
        return self.logits

    def step_and_draw(
        self, tokens: torch.Tensor, sampler: Sampler, uniforms: torch.Tensor, stop_ids: torch.Tensor
    ) -> Drawn:
        # In Python, `has_stop` would cost more than it saves; on a GPU, it would wait for the device in every step.
        if not self._decoder.runs_without_interpreter or sampler.truncates(self.logits.shape[-1]):
            return super().step_and_draw(tokens, sampler, uniforms, stop_ids)
        self.logits, drawn = self._decoder.step_and_draw(tokens, self, sampler, uniforms, stop_ids)
        self.column += 1
        return drawn

    def keep(self, rows: torch.Tensor) -> None:
        self.cache.keep(rows, self.column)
        self.logits = self.logits.index_select(0, rows)
        if self.num_padding is not None:
            self.num_padding = self.num_padding.index_select(0, rows)
            self._make_mask()


def _make_functions(device: torch.device, dtype: torch.dtype) -> tuple[LlamaFunctions, bool]:
    """Return the functions of a device, and whether they are compiled. A GPU computes while Python runs ahead."""
    if device.type != "cpu":
        return llama_functions(linear_ops(device, dtype), compile_them=False), False

    def make(compile_them: bool) -> LlamaFunctions:
        ops = scripted_linear_ops(device, dtype) if compile_them else linear_ops(device, dtype)
        return llama_functions(ops, compile_them=compile_them)

    return compiled_or_plain(make, "decode steps")


def _fuse_if_present(tensors: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor | None:
    return _fuse(tensors, names) if names[0] in tensors else None


def _fuse(tensors: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    """Stack tensors along their first dimension: a view if they are adjacent in one buffer, else a copy.

    After a copy, `tensors` refers to it, so that the digest covers the memory that the products read.
    """
    parts = [tensors[name] for name in names]
    first = parts[0]
    end = first.storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or part.storage_offset() != end:
            break
        end += part.numel()
    else:
        return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
    fused = torch.cat(parts)
    tensors.update(zip(names, fused.split([len(part) for part in parts]), strict=True))
    return fused
