"""Extracts the answer from a completion, and compares answers without computer algebra.

Every function here takes time linear in the length of the text, so it can run in the actor's process on any text that
a model writes. Pairs that these rules cannot decide go to `math_verifier`, in a process that may be killed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal, get_args

AnswerFormat = Literal["boxed", "last_number", "whole", "answer_tag", "hash"]

# A comparison of a ratio with a decimal (1/3 with 0.333333) accepts six correct significant digits.
RELATIVE_TOLERANCE = Fraction(1, 10**6)

# The answer must be near the end: only this many characters at the end are searched.
SEARCHED_CHARS = 65_536

_MAX_LITERAL_CHARS = 300
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_SPACED_INTEGER = rf"(?:[0-9]{{1,3}}(?: [0-9]{{3}})+|{_INTEGER})"
_DECIMAL = re.compile(rf"([+-]?)({_SPACED_INTEGER}?)(?:\.([0-9]*))?(?:[eE]([+-]?[0-9]{{1,3}}))?")
_RATIO = re.compile(r"([+-]?)([0-9]+) ?/ ?([0-9]+)|([+-]?)\\frac ?\{ ?([+-]?[0-9]+) ?\} ?\{ ?([0-9]+) ?\}")
_NUMBER_IN_TEXT = re.compile(rf"(?<![0-9A-Za-z_.])-?(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,3}})?")
_SPACING = re.compile(r"(?:\\[,;: ]|~|\s)+")
_BOX_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_SPELLINGS = (("\u2212", "-"), ("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("{,}", ","), ("\\!", ""), ("**", "^"))


def extract_answer(completion: str, answer_format: AnswerFormat) -> str | None:
    r"""Return the answer in `completion`, stripped; None if it contains no answer.

    Formats: "boxed", the content of the last complete `\boxed{...}`; "last_number", the last number; "whole", the full
    text; "answer_tag", the content of the last `<answer>...</answer>`; "hash", the rest of the line after the last
    `####`. All but "whole" search the last `SEARCHED_CHARS` characters.

    Example:
        >>> extract_answer(r"So the result is \boxed{42}.", "boxed")
        '42'
    """
    text = completion if answer_format == "whole" else completion[-SEARCHED_CHARS:]
    answer = _EXTRACTORS[answer_format](text)
    return (answer.strip() or None) if answer is not None else None


def _last_boxed(text: str) -> str | None:
    # One pass with a stack, so that hostile nesting takes no more time than plain text.
    open_braces: list[tuple[int, bool]] = []
    best: tuple[int, int] | None = None
    for match in _BOX_TOKEN.finditer(text):
        token = match.group()
        if token[-1] == "{" and token != "\\{":
            open_braces.append((match.end(), len(token) > 1))
        elif token == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box and (best is None or start > best[0]):
                best = (start, match.start())
    return text[slice(*best)] if best else None


def _last_number(text: str) -> str | None:
    numbers: list[str] = _NUMBER_IN_TEXT.findall(text)
    return numbers[-1] if numbers else None


def _last_answer_tag(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end] if start >= 0 else None


def _after_hash(text: str) -> str | None:
    _, marker, rest = text.rpartition("####")
    return rest.lstrip().partition("\n")[0] if marker else None


_EXTRACTORS: dict[AnswerFormat, Callable[[str], str | None]] = {
    "boxed": _last_boxed,
    "last_number": _last_number,
    "whole": lambda text: text,
    "answer_tag": _last_answer_tag,
    "hash": _after_hash,
}
assert set(_EXTRACTORS) == set(get_args(AnswerFormat))


def normalise(answer: str) -> str:
    """Return one spelling for answers that differ only in typography: spaces, dollar signs, minus signs, full stop."""
    text = answer.strip()
    if text.isalnum():
        return text
    for spelling, plain in _SPELLINGS:
        text = text.replace(spelling, plain)
    return _SPACING.sub(" ", text).strip(" $").removesuffix(".").rstrip(" $")


def to_latex(answer: str) -> str:
    r"""Return a normalised answer in LaTeX: `1.5e3` becomes `1.5 \times 10^{3}`, so it is not read as 1.5 * e * 3."""
    match = _DECIMAL.fullmatch(answer) if len(answer) <= _MAX_LITERAL_CHARS else None
    if match is None or match.group(4) is None or not (match.group(2) or match.group(3)):
        return answer
    return f"{answer[: match.start(4) - 1]} \\times 10^{{{int(match.group(4))}}}"


@dataclass(frozen=True)
class RationalLiteral:
    """A number written in digits: its exact value, and whether it is written as a ratio."""

    value: Fraction
    is_ratio: bool


@lru_cache(maxsize=10_000)  # the completions of one prompt have the same ground truth
def rational_literal(text: str) -> RationalLiteral | None:
    r"""Parse a normalised integer, decimal, scientific number, `a/b` or `\frac{a}{b}`; None for any other text."""
    if len(text) > _MAX_LITERAL_CHARS:
        return None
    if match := _RATIO.fullmatch(text):
        sign, numerator, denominator = match.groups()[:3] if match.group(2) else match.groups()[3:]
        if int(denominator) == 0:
            return None
        value = Fraction(int(numerator), int(denominator))
        return RationalLiteral(-value if sign == "-" else value, is_ratio=True)
    match = _DECIMAL.fullmatch(text)
    if match is None or not (match.group(2) or match.group(3)):
        return None
    sign, integer, decimals, exponent = match.groups()
    digits = integer.replace(",", "").replace(" ", "") + (decimals or "")
    value = Fraction(int(digits)) * Fraction(10) ** (int(exponent or 0) - len(decimals or ""))
    return RationalLiteral(-value if sign == "-" else value, is_ratio=False)


def same_number(answer: RationalLiteral, truth: RationalLiteral) -> bool:
    """Return whether two numbers are equal. A decimal equals a ratio if six significant digits are correct."""
    if answer.value == truth.value:
        return True
    if answer.is_ratio == truth.is_ratio:
        return False
    return abs(answer.value - truth.value) <= RELATIVE_TOLERANCE * abs(truth.value)


def compare_cheaply(answer: str, truth: str) -> bool | None:
    """Return whether two normalised answers are equal; None if only computer algebra can decide."""
    if answer == truth:
        return True
    answer_number, truth_number = rational_literal(answer), rational_literal(truth)
    if answer_number is None or truth_number is None:
        return None
    return same_number(answer_number, truth_number)
