"""The embedded models: tiny Llamas with a character tokenizer, trained by the project itself.

A job can train and improve them without a download and without a GPU.

======================== ======================================== =================================
`policy.model_name`      task                                     module
======================== ======================================== =================================
`embedded`               sums: a prompt, an answer                `arithmetic`
`embedded-chat`          dialogues: a guessing game, a calculator `chat`
======================== ======================================== =================================

They start from random weights. A short supervised warm-up teaches the format and part of the task; reinforcement
learning does the rest. The accuracy rises abruptly: within 50 steps from a tenth of the answers to most of them. The
step at which this happens depends on the machine, because sums are rounded differently, so the warm-up ends at an
accuracy and not at a step.

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
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl import settings
from nemo_rl.models.embedded import arithmetic, chat
from nemo_rl.models.embedded.recipe import Recipe, architecture, make_model, warm_up
from nemo_rl.models.policy.config import EMBEDDED_CHAT_MODEL, EMBEDDED_MODEL, EmbeddedModelConfig
from nemo_rl.utils.files import sync_tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["architecture", "ensure_embedded_model", "make_model", "make_tokenizer"]

logger = logging.getLogger(__name__)

_RECIPES: dict[str, Recipe] = {EMBEDDED_MODEL: arithmetic.RECIPE, EMBEDDED_CHAT_MODEL: chat.RECIPE}


def ensure_embedded_model(config: EmbeddedModelConfig, name: str = EMBEDDED_MODEL) -> Path:
    """Return the directory of an embedded model, a Hugging Face model with tokenizer. Build it first if necessary.

    The build takes about 15 to 30 seconds. The model is kept in `settings.cache_dir()`, one directory per name,
    configuration, version of the recipe and versions of the libraries. Any number of processes may call this at the
    same time.

    Example:

        directory = ensure_embedded_model(EmbeddedModelConfig())
        model = AutoModelForCausalLM.from_pretrained(directory)
    """
    directory = settings.cache_dir() / name / _digest(config, _RECIPES[name].version)
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_suffix(".lock")):
        if not directory.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
            try:
                _build(config, name, unfinished)
                sync_tree(unfinished)  # the directory is used for good, also after a power failure
                unfinished.rename(directory)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
    return directory


def _build(config: EmbeddedModelConfig, name: str, directory: Path) -> None:
    """Train an embedded model and save it into `directory`."""
    from transformers.utils import logging as transformers_logging

    started = time.monotonic()
    recipe = _RECIPES[name]
    logger.info("building the %s model (once): at most %d supervised steps", name, config.warmup_steps)
    tokenizer = recipe.make_tokenizer()
    model = make_model(config, tokenizer)
    steps, accuracy = warm_up(model, tokenizer, config, recipe)
    shows_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    finally:
        if shows_progress:
            transformers_logging.enable_progress_bar()
    logger.info(
        "built the %s model in %.0f s: %d steps, %.0f%% of the train problems correct",
        name,
        time.monotonic() - started,
        steps,
        100 * accuracy,
    )


def _digest(config: EmbeddedModelConfig, recipe_version: int) -> str:
    recipe: dict[str, Any] = {
        "recipe": recipe_version,
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


def make_tokenizer(name: str = EMBEDDED_MODEL) -> PreTrainedTokenizerFast:
    """Return the tokenizer of an embedded model."""
    return _RECIPES[name].make_tokenizer()
