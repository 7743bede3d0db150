"""A reward model as an environment: a transformers model for sequence classification scores the conversation.

The episodes of a worker run at the same time, up to `env.<name>.concurrency`. Those that have ended wait for the model
together: whoever finds it free scores all that wait, in batches.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from nemo_rl.environments.scoring import Conversation, Score, ScoredEpisode
from nemo_rl.environments.scoring_config import RewardModelConfig
from nemo_rl.errors import ConfigError, EnvironmentFailure


@dataclass(frozen=True)
class _Request:
    tokens: list[int]
    score: Future[float] = field(default_factory=Future)


class RewardModel(ScoredEpisode):
    """One episode that a reward model scores at its end. See `ScoredEpisode` and `RewardModelConfig`.

    The model reads the conversation as its own chat template renders it; without a chat template, the texts of the
    messages one after another, and the end-of-sequence token.
    """

    config_class = RewardModelConfig

    @classmethod
    def make_scorer(cls, config: RewardModelConfig) -> RewardModelScorer:
        """See `ScoredEpisode.make_scorer`."""
        return RewardModelScorer(config)


class RewardModelScorer:
    """Loads a reward model, and scores conversations with it. Thread-safe.

    It runs on a GPU if Ray has reserved one for the worker (`env.<name>.num_gpus`), else on the CPU.

    Raises:
        ConfigError: The model or its tokenizer cannot be loaded, or it is no reward model.
    """

    def __init__(self, config: RewardModelConfig) -> None:
        transformers_logging.disable_progress_bar()
        self._config = config
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(config.model)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                config.model, dtype=config.dtype, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"the reward model {config.model} cannot be loaded: {reason}") from error
        if loading["missing_keys"]:
            raise ConfigError(
                f"{config.model} has no weights for {sorted(loading['missing_keys'])[0]}, so it is no trained reward "
                "model; give a model for sequence classification"
            )
        if model.config.num_labels != 1:
            raise ConfigError(f"{config.model} has {model.config.num_labels} labels; a reward model has one, the score")
        text = model.config.get_text_config()
        self._max_length: int | None = config.max_length or getattr(text, "max_position_embeddings", None)
        # transformers takes the score at the last token that is no padding, so it has to know the padding token.
        if text.pad_token_id is None:
            text.pad_token_id = model.config.pad_token_id = self._tokenizer.pad_token_id
        self._pad_token_id: int | None = text.pad_token_id
        self._batch_size = 1 if self._pad_token_id is None else config.batch_size
        self._model = model.to(self._device).eval()
        self._waiting: deque[_Request] = deque()
        self._lock = threading.Lock()

    def score(self, conversation: Conversation) -> Score:
        """Return the score. Raises `EnvironmentFailure` if the conversation is too long."""
        request = _Request(self._tokens(conversation))
        self._waiting.append(request)
        with self._lock:
            while not request.score.done():
                self._score_batch()
        return Score(request.score.result())

    def _tokens(self, conversation: Conversation) -> list[int]:
        messages = list(conversation.messages)
        tokens: list[int]
        if self._tokenizer.chat_template:
            tools = {"tools": list(conversation.tools)} if conversation.tools else {}
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, **tools)
            tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            tokens = self._tokenizer("".join(str(message["content"]) for message in messages))["input_ids"]
            end = self._tokenizer.eos_token_id
            if end is not None and tokens[-1:] != [end]:
                tokens = [*tokens, end]
        limit = self._max_length
        if limit is None or len(tokens) <= limit:
            return tokens
        if self._config.too_long == "fail":
            raise EnvironmentFailure(
                f"the conversation has {len(tokens)} tokens, and the reward model reads at most {limit}; lower "
                "max_tokens of the environment, or set config.too_long=truncate"
            )
        return tokens[-limit:]

    def _score_batch(self) -> None:
        """Score the requests that have waited longest. The caller holds the lock."""
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._batch_size))]
        try:
            scores = self._forward([request.tokens for request in batch])
        except Exception as error:
            for request in batch:
                request.score.set_exception(error)
        else:
            for request, score in zip(batch, scores, strict=True):
                request.score.set_result(score)

    @torch.inference_mode()
    def _forward(self, rows: Sequence[list[int]]) -> list[float]:
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), width), self._pad_token_id or 0)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = torch.tensor(row)
            attention_mask[index, : len(row)] = 1
        output = self._model(input_ids=input_ids.to(self._device), attention_mask=attention_mask.to(self._device))
        scores: list[float] = output.logits[:, 0].float().tolist()
        return scores
