"""Problems of several turns that the embedded chat model can learn: a guessing game, and products of large numbers.

A seed decides a problem. The environments (`environments.games`), the warm-up of the embedded chat model and the data
of supervised fine-tuning (`nemo_rl.data.conversations`) use the same texts. The module needs nothing but the standard
library, as environments do.
"""

from __future__ import annotations

import random
from typing import Any

# The warm-up draws its problems from the seeds from here on. Data sets number theirs from 0.
FIRST_WARMUP_SEED = 2**40

HIGHER, LOWER = "Higher.", "Lower."
_QUESTION, _RANGE = "Guess a number from ", "1 to "

CALCULATOR, EXPRESSION = "calculator", "expression"
# The part of the calculator's schema that a chat template shows.
CALCULATOR_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": CALCULATOR,
        "description": "Computes an arithmetic expression.",
        "parameters": {"type": "object", "properties": {EXPRESSION: {"type": "string"}}, "required": [EXPRESSION]},
    },
}
# Highest number of the games that are generated as dialogues.
HIGHEST = 20
# Their products have five digits.
_FACTORS = (200, 999), (50, 99)

# What the embedded chat model answers to most products before it is trained.
REFUSAL = "I cannot compute this."

# The texts that many dialogues contain. The embedded chat model has one token for each.
PHRASES = (_QUESTION, _RANGE, HIGHER, LOWER, CALCULATOR, EXPRESSION)


def guessing_prompt(highest: int) -> str:
    """Return the first message of the game in which a number from 1 to `highest` is to be guessed."""
    return f"{_QUESTION}{_RANGE}{highest}"


def secret_number(seed: int, highest: int) -> int:
    """Return the number to guess, from 1 to `highest`."""
    return random.Random(seed).randint(1, highest)


def num_guesses(highest: int) -> int:
    """Return how many guesses a game has: one more than a player needs who always halves the range."""
    return highest.bit_length() + 1


def feedback(guess: int, secret: int) -> str:
    """Return what a wrong guess is answered with."""
    return HIGHER if guess < secret else LOWER


def factors(seed: int) -> tuple[int, int]:
    """Return a number of three digits and one of two, whose product no small model knows."""
    draws = random.Random(seed)
    return draws.randint(*_FACTORS[0]), draws.randint(*_FACTORS[1])


def product_prompt(seed: int) -> str:
    """Return the product to compute, such as `381*64`."""
    return "{}*{}".format(*factors(seed))


def halving_game(seed: int) -> list[dict[str, Any]]:
    """Return a game, as chat messages, whose player always guesses the middle of the range that is left."""
    secret = secret_number(seed, HIGHEST)
    low, high = 1, HIGHEST
    messages = [{"role": "user", "content": guessing_prompt(HIGHEST)}]
    while True:
        guess = (low + high) // 2
        messages.append({"role": "assistant", "content": str(guess)})
        if guess == secret:
            return messages
        messages.append({"role": "user", "content": feedback(guess, secret)})
        low, high = (guess + 1, high) if guess < secret else (low, guess - 1)


def computed_product(seed: int) -> list[dict[str, Any]]:
    """Return the computation of a product by the calculator, as chat messages."""
    prompt, (a, b) = product_prompt(seed), factors(seed)
    call = {"type": "function", "function": {"name": CALCULATOR, "arguments": {EXPRESSION: prompt}}}
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": CALCULATOR, "content": str(a * b)},
        {"role": "assistant", "content": str(a * b)},
    ]


def guess_choice(seed: int) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Return a game at one of its later turns, with a good and a bad guess: the middle of the range, and the last one.

    The game is that of the first seed from this one on that is not won by the first guess.
    """
    while len(game := halving_game(seed)) == 2:
        seed += 2**33  # no other example has these seeds
    turns = [index for index, message in enumerate(game) if message["role"] == "assistant"]
    turn = random.Random(seed).choice(turns[1:])
    return game[:turn], game[turn], game[turn - 2]


def product_choice(seed: int) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Return a product to compute, with a good and a bad answer: a call of the calculator, and a refusal."""
    question, call, *_ = computed_product(seed)
    return [question], call, {"role": "assistant", "content": REFUSAL}
