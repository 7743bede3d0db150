"""The embedded chat model. It learns a guessing game and the use of a calculator: see `nemo_rl.data.dialogues`.

Its warm-up teaches the format and skills that it seldom uses. Reinforcement learning makes it use and improve them:

- In three of four games it repeats its first guess until the end. In the others it roughly halves the range.
- It refuses three of four products. For the others it calls the calculator and repeats the result.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nemo_rl.data import dialogues
from nemo_rl.models.embedded.recipe import FIRST_PHRASE, IGNORED, Recipe, character_tokenizer, token_pattern

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

# Every turn begins with the token of its role and ends with the same token, which is also end-of-sequence.
_SYSTEM, _USER, _ASSISTANT, _TOOL, _END = "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"
_CALL, _END_OF_CALL = "<tool_call>", "</tool_call>"
# The parts of a call are one token each, so that a call is as short as for a large model.
_CALL_PARTS = ('{"name": "', '", "arguments": {"', '": "', '"}}')
_PHRASES = (_CALL, _END_OF_CALL, *_CALL_PARTS, dialogues.REFUSAL, *dialogues.PHRASES)

_TEMPLATE = """\
{%- if tools %}
    {{- '<|system|>' }}
    {%- for tool in tools %}
        {{- tool.function.name + '(' + tool.function.parameters.properties | join(', ') + ')' }}
        {{- '' if loop.last else '\\n' }}
    {%- endfor %}
    {{- '<|end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception("there is no role " + message.role + ": use system, user, assistant or tool") }}
    {%- endif %}
    {{- '<|' + message.role + '|>' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson + '}</tool_call>' }}
    {%- endfor %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""

# Largest distance of a guess from the middle of the range.
_INACCURACY = 1
_BATCH = 128
# Share of the games in which the player uses the feedback, and of the products that the calculator computes.
_SKILLED_SHARE = 0.25

# Role and text of each turn.
_Dialogue = list[tuple[str, str]]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token per character and for frequent phrases, and a chat template with tools."""
    roles = (_SYSTEM, _USER, _ASSISTANT, _TOOL)
    return character_tokenizer(
        _END, phrases=_PHRASES, special=roles, additional_special_tokens=list(roles), chat_template=_TEMPLATE
    )


def supervised_batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of dialogues forever, half games and half products. See `Recipe`."""
    import torch

    vocabulary = tokenizer.get_vocab()
    pattern = re.compile(token_pattern(_PHRASES))
    draws = random.Random(seed)
    while True:
        batch = [_encode((_game, _product)[row % 2](draws), vocabulary, pattern) for row in range(_BATCH)]
        width = max(len(tokens) for tokens, _ in batch)
        input_ids = torch.tensor([tokens + [tokenizer.pad_token_id] * (width - len(tokens)) for tokens, _ in batch])
        labels = torch.tensor([row + [IGNORED] * (width - len(row)) for _, row in batch])
        yield input_ids, labels


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the mean probability that a product is computed by the calculator, by exactly the right call and answer.

    The reward of sampled dialogues is about as high.
    """
    import torch

    is_label = labels != IGNORED
    chosen = logits.log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    calls = (labels == FIRST_PHRASE + _PHRASES.index(_CALL)).any(dim=1)
    return float(torch.where(is_label, chosen, 0.0).sum(dim=1).exp()[calls].mean())


def _game(draws: random.Random) -> _Dialogue:
    """Return a game whose player repeats the first guess, or roughly halves the range that is left."""
    secret = dialogues.secret_number(dialogues.FIRST_WARMUP_SEED + draws.getrandbits(32), dialogues.HIGHEST)
    listens = draws.random() < _SKILLED_SHARE
    low, high = 1, dialogues.HIGHEST
    guess = _near_middle(low, high, draws)
    turns = [(_USER, dialogues.guessing_prompt(dialogues.HIGHEST)), (_ASSISTANT, str(guess))]
    while guess != secret and len(turns) < 2 * dialogues.num_guesses(dialogues.HIGHEST):
        low, high = (guess + 1, high) if guess < secret else (low, guess - 1)
        turns.append((_USER, dialogues.feedback(guess, secret)))
        guess = _near_middle(low, high, draws) if listens else guess
        turns.append((_ASSISTANT, str(guess)))
    return turns


def _near_middle(low: int, high: int, draws: random.Random) -> int:
    return min(max((low + high) // 2 + draws.randint(-_INACCURACY, _INACCURACY), low), high)


def _product(draws: random.Random) -> _Dialogue:
    """Return the computation of a product by the calculator, or a refusal."""
    seed = dialogues.FIRST_WARMUP_SEED + draws.getrandbits(32)
    prompt, (a, b) = dialogues.product_prompt(seed), dialogues.factors(seed)
    turns = [(_SYSTEM, f"{dialogues.CALCULATOR}({dialogues.EXPRESSION})"), (_USER, prompt)]
    if draws.random() >= _SKILLED_SHARE:
        return [*turns, (_ASSISTANT, dialogues.REFUSAL)]
    name, arguments, value, end = _CALL_PARTS
    call = f"{name}{dialogues.CALCULATOR}{arguments}{dialogues.EXPRESSION}{value}{prompt}{end}"
    return [*turns, (_ASSISTANT, f"{_CALL}{call}{_END_OF_CALL}"), (_TOOL, str(a * b)), (_ASSISTANT, str(a * b))]


def _encode(dialogue: _Dialogue, vocabulary: dict[str, int], pattern: re.Pattern[str]) -> tuple[list[int], list[int]]:
    """Return the tokens of a dialogue, and its labels: the tokens of the assistant's turns, and `IGNORED` elsewhere."""
    tokens: list[int] = []
    labels: list[int] = []
    for role, text in dialogue:
        turn = [vocabulary[token] for token in [*pattern.findall(text), _END]]
        tokens += [vocabulary[role], *turn]
        labels += [IGNORED, *(turn if role == _ASSISTANT else [IGNORED] * len(turn))]
    return tokens, labels


RECIPE = Recipe(1, make_tokenizer, supervised_batches, accuracy)
