"""Converts problems to token ids: prompt template, chat template, tokenizer, and a check of prompt lengths."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from nemo_rl.data.config import DataConfig
from nemo_rl.data.problem import ChatMessage, Problem, ProblemDataset
from nemo_rl.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

PLACEHOLDER = "{problem}"
_TOKENIZER_BATCH_SIZE = 1024


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    chat_template: Any
    pad_token_id: Any

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> Any: ...

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool, **variables: Any
    ) -> Any: ...


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[ChatMessage],
    now: datetime,
    *,
    tools: Sequence[dict[str, Any]] = (),
    what: str = "the prompt",
    opens_turn: bool = True,
) -> str:
    """Render messages by the tokenizer's chat template.

    Args:
        tokenizer: The model's tokenizer.
        messages: The conversation.
        tools: JSON schemas of the tools that the template shows to the model.
        now: See `PromptFormatter`.
        what: What the messages are, for the error.
        opens_turn: Render up to the start of the model's next turn, not only to the end of the last message.

    Raises:
        DataError: The chat template rejects the messages.
    """
    variables: dict[str, Any] = {"tools": list(tools)} if tools else {}
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=opens_turn, strftime_now=now.strftime, **variables
        )
    except Exception as error:
        # A chat template is a program by the model's author. It may raise any error for unexpected roles or orders.
        raise DataError(f"the tokenizer's chat template rejects {what}: {error}") from error
    return text


class PromptFormatter:
    """Formats a problem's prompt as the text that the model reads.

    A text prompt is inserted into `data.prompt_template`. If the tokenizer has a chat template (and
    `data.apply_chat_template` is true), the result becomes a user message after `data.system_prompt`.

    The result depends on the problem, the templates and `now` only.

    Args:
        tokenizer: The model's tokenizer.
        config: The templates and the system prompt.
        now: The time that `strftime_now` of a chat template formats. A run passes the time at which it began, so that
            a resumed run has the same prompts. None: the current time.

    Raises:
        ConfigError: The template does not contain `{problem}`, its file is missing, there is a system prompt but no
            chat template, or the chat template draws random values.
    """

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, now: datetime | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = _read_template(config.prompt_template)
        self._system_prompt = config.system_prompt
        self._now = now or datetime.now()
        self.is_chat = config.apply_chat_template and bool(tokenizer.chat_template)
        self._num_appended = 0 if self.is_chat else num_appended(tokenizer)
        if self._system_prompt is not None and not self.is_chat:
            raise ConfigError(
                "data.system_prompt needs a chat model, but the tokenizer has no chat template or "
                "data.apply_chat_template is false; put the text into data.prompt_template instead"
            )
        if self.is_chat:
            check_template_is_stable(tokenizer.chat_template)

    def text(self, prompt: str | list[ChatMessage], where: str, tools: Sequence[dict[str, Any]] = ()) -> str:
        """Return the full prompt; `where` names the record in messages, and `tools` are for the chat template.

        Raises:
            DataError: The prompt consists of chat messages, but there is no chat template, or it rejects
                them or does not show a tool.
        """
        if isinstance(prompt, str):
            # Not str.format: problems and templates may contain braces, as in LaTeX.
            prompt = self._template.replace(PLACEHOLDER, prompt)
            if not self.is_chat:
                return prompt
            prompt = [{"role": "user", "content": prompt}]
        elif not self.is_chat:
            raise DataError(
                f"{where}: the prompt is a list of chat messages, but the tokenizer has no chat template or "
                "data.apply_chat_template is false"
            )
        if self._system_prompt is not None and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": self._system_prompt}, *prompt]
        try:
            text = render_chat(self._tokenizer, prompt, self._now, tools=tools)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        unseen = [name for name in map(_tool_name, tools) if name not in text]
        if unseen:
            raise DataError(f"{where}: the tokenizer's chat template does not show the tool {unseen[0]!r} to the model")
        return text

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of each prompt, without tokens that the tokenizer appends behind a text.

        Some tokenizers append end-of-sequence. A model that reads it considers the text complete and starts another.
        """
        # A chat template adds the special tokens itself.
        encoded: list[list[int]] = self._tokenizer(texts, add_special_tokens=not self.is_chat)["input_ids"]
        if self._num_appended:
            return [tokens[: -self._num_appended] for tokens in encoded]
        return encoded


def check_template_is_stable(chat_template: Any) -> None:
    """Raise `ConfigError` for a chat template that draws random values."""
    if drawn := _random_value(chat_template):
        raise ConfigError(
            f"the tokenizer's chat template uses {drawn}, which returns another text at every rendering, so a "
            "resumed run would have other prompts; remove it from the template, or set "
            "data.apply_chat_template=false"
        )


def _random_value(chat_template: Any) -> str | None:
    """Return the name of a Jinja filter or function that draws random values in a chat template, or None."""
    import jinja2

    # A tokenizer may have several templates, by name.
    texts = chat_template.values() if isinstance(chat_template, dict) else [chat_template]
    for text in texts:
        tokens = [(kind, value) for _, kind, value in jinja2.Environment().lex(text) if kind != "whitespace"]
        for before, token in zip([("", ""), *tokens], tokens):
            if token == ("name", "lipsum") or (before, token) == (("operator", "|"), ("name", "random")):
                return f"`{token[1]}`"
    return None


def num_appended(tokenizer: Tokenizer) -> int:
    """Return how many special tokens the tokenizer appends to every text."""
    [plain] = tokenizer(["1"], add_special_tokens=False)["input_ids"]
    [framed] = tokenizer(["1"], add_special_tokens=True)["input_ids"]
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return len(framed) - start - len(plain)
    return 0


@dataclass(frozen=True)
class TokenizedProblem:
    """A problem ready for generation.

    Attributes:
        problem: The problem.
        text: The prompt as the model reads it.
        input_ids: Its tokens, int32 [prompt length], at least one.
    """

    problem: Problem
    text: str
    input_ids: NDArray[np.int32]


class TokenizedProblems(Sequence[TokenizedProblem]):
    """Tokenizes all prompts of a data set once, before any worker starts.

    Memory holds the tokens, 4 bytes each; the texts are read again when they are accessed.

    Example:

        dataset = ArithmeticDataset("train", 1000)
        problems = TokenizedProblems(dataset, tokenizer, DataConfig())
        print(problems[0].text, problems[0].input_ids)

    Args:
        dataset: The problems.
        tokenizer: The model's tokenizer.
        config: Templates, `max_prompt_length`, and what to do with longer prompts.
        now: See `PromptFormatter`.

    Attributes:
        num_dropped: Number of problems dropped because their prompts are too long.
        digest: Changes with any prompt token or answer, so that a resumed run detects changed data.

    Raises:
        ConfigError: See `PromptFormatter`.
        DataError: See `PromptFormatter`. Or a prompt has no tokens, a prompt is too long and such prompts are not
            dropped, or all prompts are dropped.
    """

    def __init__(
        self, dataset: ProblemDataset, tokenizer: Tokenizer, config: DataConfig, now: datetime | None = None
    ) -> None:
        self._dataset = dataset
        self._formatter = PromptFormatter(tokenizer, config, now)
        ids, offsets, kept = array("i"), array("q", [0]), array("q")
        digest = xxhash.xxh3_64()
        longest = 0
        for start in range(0, len(dataset), _TOKENIZER_BATCH_SIZE):
            problems = dataset[start : start + _TOKENIZER_BATCH_SIZE]
            texts = [self._text(problem) for problem in problems]
            for problem, tokens in zip(problems, self._formatter.tokenize(texts)):
                longest = max(longest, len(tokens))
                if self._fits(len(tokens), problem.index, config):
                    ids.extend(tokens)
                    offsets.append(len(ids))
                    kept.append(problem.index)
                    digest.update(array("i", tokens).tobytes())
                    digest.update(problem.answer.encode("utf-8", "surrogatepass") + b"\0")
        self._ids, self._offsets = np.asarray(ids, dtype=np.int32), np.asarray(offsets)
        self._kept = np.asarray(kept)
        self.digest: str = digest.hexdigest()
        self.num_dropped = len(dataset) - len(kept)
        if self.num_dropped:
            what = f"{self.num_dropped} of {len(dataset)} prompts are longer than {config.max_prompt_length} tokens"
            if not len(kept):
                raise DataError(f"{what} (the longest has {longest}); raise data.max_prompt_length")
            logger.warning("%s and are dropped (the longest has %d)", what, longest)

    def _text(self, problem: Problem) -> str:
        """Return the full prompt. A problem without a prompt is for environments, which show their own."""
        return self._formatter.text(problem.prompt, self._dataset.where(problem.index)) if problem.prompt else ""

    def _fits(self, length: int, index: int, config: DataConfig) -> bool:
        if length == 0 and self._dataset[index].prompt:
            raise DataError(f"{self._dataset.where(index)}: the prompt has no tokens")
        if length > config.max_prompt_length and config.overlong_prompts == "error":
            raise DataError(
                f"{self._dataset.where(index)}: the prompt has {length} tokens, more than "
                f"data.max_prompt_length={config.max_prompt_length}; raise that, or set data.overlong_prompts=drop"
            )
        return length <= config.max_prompt_length

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> TokenizedProblem: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedProblem]: ...

    def __getitem__(self, index: int | slice) -> TokenizedProblem | list[TokenizedProblem]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"problem {index} is out of range: there are {len(self)}")
        problem = self._dataset[int(self._kept[position])]
        return TokenizedProblem(
            problem, self._text(problem), self._ids[self._offsets[position] : self._offsets[position + 1]]
        )


def _tool_name(schema: dict[str, Any]) -> str:
    return str(schema.get("function", schema).get("name"))


def _read_template(value: str | None) -> str:
    if value is None:
        return PLACEHOLDER
    if PLACEHOLDER in value:
        return value
    path = Path(value).expanduser()
    try:
        template = path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.prompt_template: {path} cannot be read: {error}") from error
    if template is None:
        raise ConfigError(f"data.prompt_template={value!r} does not contain {PLACEHOLDER} and is not a file")
    if PLACEHOLDER not in template:
        raise ConfigError(f"data.prompt_template: {path} does not contain {PLACEHOLDER}")
    return template
