"""What the embedded models share: the architecture, the warm-up, and what differs between them as a `Recipe`."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_rl.models.policy.config import EmbeddedModelConfig

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

PAD, BOS, UNKNOWN = "<pad>", "<bos>", "<unk>"
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
IGNORED = -100
# Token of the first phrase of a `character_tokenizer`; the others follow.
FIRST_PHRASE = 4 + len(CHARACTERS)
_CONTEXT = 512
_WARMUP_LR = 2e-3
_WARMUP_LR_STEPS = 20
# Batches over which the accuracy is averaged.
_ACCURACY_BATCHES = 4
# The number of threads decides how sums are rounded. One thread is the same everywhere and fast enough at this size.
_WARMUP_THREADS = 1


@dataclass(frozen=True)
class Recipe:
    """Says how one embedded model is made.

    Attributes:
        version: Increase it with every change that changes the model, so that no older one in the cache is used.
        make_tokenizer: Returns the tokenizer.
        batches: Yields batches of the warm-up forever, given tokenizer and seed: input_ids [B, T] int64, padded on the
            right, and labels [B, T] int64, which are `IGNORED` where nothing is learned.
        accuracy: Returns the accuracy of a batch, given logits [B, T - 1, V] and labels [B, T - 1] of the next tokens.
    """

    version: int
    make_tokenizer: Callable[[], PreTrainedTokenizerFast]
    batches: Callable[[PreTrainedTokenizerFast, int], Iterator[tuple[torch.Tensor, torch.Tensor]]]
    accuracy: Callable[[torch.Tensor, torch.Tensor], float]


def character_tokenizer(
    eos: str, *, phrases: Sequence[str] = (), special: Sequence[str] = (), **options: Any
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per printable ASCII character and newline, plus pad, bos, eos and unknown.

    Args:
        eos: The end-of-sequence token.
        phrases: Texts that are one token each.
        special: Further special tokens.
        options: Further arguments of `PreTrainedTokenizerFast`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([PAD, BOS, eos, UNKNOWN, *CHARACTERS, *phrases, *special])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(token_pattern(phrases)), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=eos,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=_CONTEXT,
        **options,
    )


def token_pattern(phrases: Sequence[str]) -> str:
    """Return the regular expression of a token that is not special: the longest phrase, else one character."""
    return "|".join([*map(re.escape, sorted(phrases, key=len, reverse=True)), r"[\s\S]"])


def architecture(config: EmbeddedModelConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the model's Hugging Face configuration."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.hidden_size * 8 // 3 // 8 * 8,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        max_position_embeddings=_CONTEXT,
        tie_word_embeddings=True,
        initializer_range=config.hidden_size**-0.5 / 2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def make_model(config: EmbeddedModelConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama whose random weights depend only on `config.seed`. Torch's random state does not change."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LlamaForCausalLM(architecture(config, tokenizer))


def warm_up(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, config: EmbeddedModelConfig, recipe: Recipe
) -> tuple[int, float]:
    """Train until the accuracy is `config.warmup_accuracy`, or for `config.warmup_steps` steps.

    Returns:
        Number of steps, and the accuracy over the last batches, each measured before its step.
    """
    import torch
    import torch.nn.functional as F

    from nemo_rl.models.policy.cpu_kernels import use_onednn_linears

    use_onednn_linears(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_WARMUP_LR, betas=(0.9, 0.95), weight_decay=0.0)
    batches = recipe.batches(tokenizer, config.seed)
    recent: deque[float] = deque([0.0] * _ACCURACY_BATCHES, maxlen=_ACCURACY_BATCHES)
    threads = torch.get_num_threads()
    torch.set_num_threads(_WARMUP_THREADS)
    try:
        for step in range(config.warmup_steps):
            input_ids, labels = next(batches)
            logits, targets = model(input_ids=input_ids).logits[:, :-1], labels[:, 1:]
            recent.append(recipe.accuracy(logits.detach(), targets))
            logger.debug("warm-up step %d: accuracy %.3f", step, recent[-1])
            if sum(recent) / len(recent) >= config.warmup_accuracy:
                return step, sum(recent) / len(recent)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = _WARMUP_LR * min(1.0, (step + 1) / _WARMUP_LR_STEPS)
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return config.warmup_steps, sum(recent) / len(recent)
