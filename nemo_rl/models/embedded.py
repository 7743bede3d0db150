"""The embedded model: a tiny Llama with a character tokenizer, trained by the project itself.

A job can train and improve it without a download and without a GPU.

It starts from random weights. A short supervised warm-up on train problems of the embedded data set teaches it the
answer format (the bare answer, then end-of-sequence) and part of the task; reinforcement learning does the rest. The
accuracy rises abruptly: within 50 steps from a tenth of the answers to most of them. The step at which this happens
depends on the machine, because sums are rounded differently, so the warm-up ends at an accuracy and not at a step.

A finished model is a directory that appears atomically (by a rename), so any process may use a directory that exists.
One process holds a lock and builds the model. The other processes wait and reuse it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl import settings
from nemo_rl.data.arithmetic import ArithmeticDataset, num_distinct
from nemo_rl.models.policy.config import EmbeddedModelConfig
from nemo_rl.utils.files import sync_tree

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
_CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
_CONTEXT = 512
_IGNORED = -100
# Increase it with every change of this file that changes the model, so that no older model in the cache is used.
_RECIPE = 1
_WARMUP_LEVELS = (1,)
_WARMUP_BATCH = 256
_WARMUP_LR = 2e-3
_WARMUP_LR_STEPS = 20
# Batches over which the accuracy is averaged: 1,024 problems.
_ACCURACY_BATCHES = 4
# The number of threads decides how sums are rounded. One thread is the same everywhere and fast enough at this size.
_WARMUP_THREADS = 1


def ensure_embedded_model(config: EmbeddedModelConfig) -> Path:
    """Return the directory of the embedded model, a Hugging Face model with tokenizer. Build it first if necessary.

    The build takes about 15 seconds. The model is kept in `settings.cache_dir()`, one directory per configuration,
    version of this recipe and versions of the libraries. Any number of processes may call this at the same time.

    Example:

        directory = ensure_embedded_model(EmbeddedModelConfig())
        model = AutoModelForCausalLM.from_pretrained(directory)
    """
    directory = settings.cache_dir() / "embedded" / _digest(config)
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_suffix(".lock")):
        if not directory.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
            try:
                _build(config, unfinished)
                sync_tree(unfinished)  # the directory is used for good, also after a power failure
                unfinished.rename(directory)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
    return directory


def _build(config: EmbeddedModelConfig, directory: Path) -> None:
    """Train the embedded model and save it into `directory`."""
    from transformers.utils import logging as transformers_logging

    started = time.monotonic()
    logger.info("building the embedded model (once): at most %d supervised steps", config.warmup_steps)
    tokenizer = make_tokenizer()
    model = make_model(config, tokenizer)
    steps, accuracy = warm_up(model, tokenizer, config)
    shows_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    finally:
        if shows_progress:
            transformers_logging.enable_progress_bar()
    logger.info(
        "built the embedded model in %.0f s: %d steps, %.0f%% of the train problems correct",
        time.monotonic() - started,
        steps,
        100 * accuracy,
    )


def _digest(config: EmbeddedModelConfig) -> str:
    recipe: dict[str, Any] = {
        "recipe": _RECIPE,
        "config": config.model_dump(mode="json"),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file. The system releases it when the process dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per printable ASCII character and newline, plus pad, bos, eos and unknown."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, UNKNOWN, *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=_CONTEXT,
    )


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


def supervised_batches(
    tokenizer: PreTrainedTokenizerFast, levels: tuple[int, ...], batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of train problems with their answers forever, drawn with replacement.

    Yields:
        input_ids [B, T] int64, padded on the right, and labels [B, T] int64: the answer's tokens and end-of-sequence,
        -100 elsewhere.
    """
    import numpy as np
    import torch

    vocabulary = tokenizer.get_vocab()
    dataset = ArithmeticDataset("train", num_distinct("train", levels), levels)
    rows = []
    for index in range(len(dataset)):
        problem = dataset.problem(index)
        assert isinstance(problem.prompt, str)
        prompt, answer = ([vocabulary[character] for character in text] for text in (problem.prompt, problem.answer))
        rows.append((prompt, [*answer, vocabulary[EOS]]))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), width), vocabulary[PAD])
    labels = torch.full((len(rows), width), _IGNORED)
    for index, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        input_ids[index, :end] = torch.tensor(prompt + answer)
        labels[index, len(prompt) : end] = torch.tensor(answer)
    draws = np.random.Generator(np.random.Philox(seed))
    while True:
        batch = torch.from_numpy(draws.integers(len(rows), size=batch_size))
        yield input_ids[batch], labels[batch]


def warm_up(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, config: EmbeddedModelConfig
) -> tuple[int, float]:
    """Train until `config.warmup_accuracy` of the train problems are correct, or for `config.warmup_steps` steps.

    A problem is correct if the likeliest token is the expected one at every position of its answer. Greedy decoding
    then gives the answer.

    Returns:
        Number of steps, and the accuracy over the last batches, each measured before its step.
    """
    import torch
    import torch.nn.functional as F

    from nemo_rl.models.policy.cpu_kernels import use_onednn_linears

    use_onednn_linears(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_WARMUP_LR, betas=(0.9, 0.95), weight_decay=0.0)
    batches = supervised_batches(tokenizer, _WARMUP_LEVELS, _WARMUP_BATCH, config.seed)
    recent: deque[float] = deque([0.0] * _ACCURACY_BATCHES, maxlen=_ACCURACY_BATCHES)
    threads = torch.get_num_threads()
    torch.set_num_threads(_WARMUP_THREADS)
    try:
        for step in range(config.warmup_steps):
            input_ids, labels = next(batches)
            logits, targets = model(input_ids=input_ids).logits[:, :-1], labels[:, 1:]
            correct = (logits.argmax(-1) == targets) | (targets == _IGNORED)
            recent.append(float(correct.all(dim=1).float().mean()))
            logger.debug("warm-up step %d: %.3f of the answers correct", step, recent[-1])
            if sum(recent) / len(recent) >= config.warmup_accuracy:
                return step, sum(recent) / len(recent)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = _WARMUP_LR * min(1.0, (step + 1) / _WARMUP_LR_STEPS)
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return config.warmup_steps, sum(recent) / len(recent)
