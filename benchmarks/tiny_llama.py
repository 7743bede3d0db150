"""Writes a tiny Llama and its tokenizer for benchmarks, in a directory that any Hugging Face framework can load.

The model has 624 k parameters: hidden 128, 4 layers, 4 heads, 2 key-value heads, intermediate 256, vocabulary 128 (one
token per character), random weights. It **never ends a completion by itself**, so two frameworks generate the same
number of tokens without further settings. One residual channel is constant, because every token writes to it and no
layer does. The output row of end-of-sequence reads only that channel, with a negative weight.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 128
SPECIAL = ("<pad>", "<eos>", "<unk>")
CONTEXT = 256
NUM_EMBEDDINGS = VOCABULARY * 128  # parameters that are looked up, not multiplied
PROMPT_LENGTH = 17  # tokens of each prompt of `write_problems`
_CHANNEL = 0  # the constant channel
_EOS_WEIGHT = -6.0  # -44 as a logit: probability below 1e-21


def make_model(directory: Path, seed: int = 0) -> int:
    """Write the model and tokenizer to `directory`. Returns the number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<eos>"),
        pad_token_id=SPECIAL.index("<pad>"),
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, _CHANNEL] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[_CHANNEL] = 0.0
            layer.mlp.down_proj.weight[_CHANNEL] = 0.0
        eos = model.lm_head.weight[config.eos_token_id]
        eos.zero_()
        eos[_CHANNEL] = _EOS_WEIGHT
    model.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def write_problems(path: Path, count: int) -> list[dict[str, str]]:
    """Write `count` subtractions of two-digit numbers with one-digit answers as JSON lines. Returns the records.

    All prompts have the same length, so neither framework pads.
    """
    pairs = [(a, b) for a in range(20, 100) for b in range(a - 9, a + 1) if b >= 10]
    stride = 7  # coprime to the number of pairs, so consecutive problems differ
    chosen = [pairs[index * stride % len(pairs)] for index in range(count)]
    records = [{"problem": f"What is {a} - {b}? ", "answer": str(a - b)} for a, b in chosen]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return records


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [chr(code) for code in range(32, 127)]
    others = [chr(code) for code in range(0xC0, 0xC0 + VOCABULARY - len(SPECIAL) - len(printable))]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *printable, *others])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        padding_side="left",
    )
