"""Extracts the answer from a completion, and compares answers without computer algebra.

Every function here takes time linear in the length of the text, so it can run in the actor's process on any text that
a model writes. Pairs that these rules cannot decide go to `math_verifier`, in a process that may be killed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

from nemo_rl.environments.notation import ascii_characters, plain_to_latex
from nemo_rl.environments.notation import normalise as normalise
from nemo_rl.environments.units import split_quantity, unit_factor
from nemo_rl.errors import DataError

if TYPE_CHECKING:
    from nemo_rl.data.problem import ProblemDataset

AnswerFormat = Literal["boxed", "last_number", "whole", "answer_tag", "hash"]

# A comparison of a ratio with a decimal (1/3 with 0.333333) accepts six correct significant digits.
RELATIVE_TOLERANCE = Fraction(1, 10**6)

# The answer must be near the end: only this many characters at the end are searched.
SEARCHED_CHARS = 65_536

# A decimal with so many significant digits is a rounded value; a shorter one (0.5) is exact.
ROUNDED_DIGITS = 6

_MAX_LITERAL_CHARS = 300
# Digit groups: 1,000,000 (also 12,34,567), 1'000'000, 1_000_000, 1 000 000 and, with a decimal comma, 1.000.000,5.
_GROUPED = (
    r"[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])|[0-9]{1,3}(?:'[0-9]{3})+(?![0-9])|[0-9]{1,3}(?:_[0-9]{3})+(?![0-9])"
)
_INTEGER = rf"(?:{_GROUPED}|[0-9]+)"
_SPACED_INTEGER = rf"(?:[0-9]{{1,3}}(?: [0-9]{{3}})+(?![0-9])|{_INTEGER})"
_COMMA_DECIMAL = r"(?:[0-9]{1,3}(?:\.[0-9]{3}){2,}(?:,[0-9]+)?|[0-9]{1,3}(?:[. ][0-9]{3})+,[0-9]+|0,[0-9]+)(?![0-9])"
_EXPONENT = r"(?:[eE]([+-]?[0-9]{1,3})| ?(?:\\times|\\cdot|[*xX]) ?10 ?\^ ?(?:\{ ?([+-]?[0-9]{1,3}) ?\}|([0-9]{1,3})))"
_DECIMAL = re.compile(rf"([+-]?) ?(?:({_COMMA_DECIMAL})|({_SPACED_INTEGER}?)(?:\.([0-9]*))?){_EXPONENT}?")
_POWER_OF_TEN = re.compile(r"([+-]?) ?10 ?\^ ?(?:\{ ?([+-]?[0-9]{1,3}) ?\}|([0-9]{1,3}))")
_REPEATING = re.compile(r"([+-]?)([0-9]*)\.([0-9]*)\\(?:overline|bar) ?\{? ?([0-9]+) ?\}?")
_RATIO = re.compile(
    r"([+-]?) ?(?:([0-9]+)[ -])? ?([0-9]+) ?/ ?([0-9]+)|"
    r"([+-]?) ?([0-9]+)? ?\\frac ?\{ ?([+-]?[0-9]+) ?\} ?\{ ?([+-]?[0-9]+) ?\}"
)
_PROPORTION = re.compile(r"([0-9]+) ?(?::| to |\\colon) ?([0-9]+)")
_SINGLE_COMMA = re.compile(r"([+-]?[0-9]+),([0-9]+)")
# What may follow or replace a number in text: a root of a number, or pi.
_FACTOR_IN_TEXT = (
    r"(?:\\sqrt ?(?:\[[0-9]+\])? ?(?:\{ ?[0-9]+(?:\.[0-9]+)? ?\}|[0-9])|sqrt ?\([0-9]+(?:\.[0-9]+)?\)|"
    r"\\pi(?![A-Za-z])|pi(?![A-Za-z]))"
)
_TERM_IN_TEXT = rf"-?(?:[0-9]+ ?{_FACTOR_IN_TEXT}?|{_FACTOR_IN_TEXT})"
_FRACTION_IN_TEXT = (
    rf"(?:[0-9]+ ?)?\\[dtc]?frac ?(?:\{{ ?{_TERM_IN_TEXT} ?\}} ?\{{ ?{_TERM_IN_TEXT} ?\}}|[0-9] ?[0-9])|"
    r"(?<![0-9]/)(?:[0-9]+ )?[0-9]+/[0-9]+(?![0-9/])"
)
# Not an exponent or index: `x^2`, `x_{12}`, `10^-3`.
_NUMBER_IN_TEXT = re.compile(
    r"(?<![0-9A-Za-z_.\\^])(?<![\^_]\{)(?<!\^-)(?<!\^\{-)-?(?:\\?\$ ?)?"
    rf"(?:(?:{_FRACTION_IN_TEXT}|"
    rf"(?:{_COMMA_DECIMAL}|{_SPACED_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][+-]?[0-9]{1,3}(?![0-9])|"
    rf"(?: *(?:\\times|\\cdot|[*xX]) *10)? ?\^ ?(?:\{{-?[0-9]+\}}|-?[0-9]+)|:[0-9]+(?![0-9:])|"
    r"(?<=[0-9]{2})(?:\.\.\.|\\ldots))?)"
    rf"(?:(?: ?(?:\\cdot|\*)? ?{_FACTOR_IN_TEXT})+(?: ?/ ?[0-9]+(?![0-9/]))?)?|"
    rf"{_FACTOR_IN_TEXT}(?: ?/ ?[0-9]+(?![0-9/]))?)"
    r"(?: ?\\?%)?(?: (?:hundred|thousand|million|billion|trillion|dozen)(?![A-Za-z]))?"
)
_BOX_TOKEN = re.compile(r"\\+(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
_DATE = re.compile(
    r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}|[0-9]{1,2}/[0-9]{1,2}/[0-9]{4}|[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})? ?[AaPp]\.?[Mm]\.?"
)
_TEXT_COMMAND = re.compile(r"\\text ?\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z',.:;!?() -]*[A-Za-z.)!?]")
# A word of three letters that is no function or constant: the answer is text, not a product of variables.
_WORD = re.compile(
    r"\b(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|cbrt|abs|floor|ceil|gcd|lcm|max|min|mod|inf|infinity|"
    r"and|alpha|beta|gamma|delta|theta|lambda|sigma|omega|phi|rho|tau|psi)\b)(?:[A-Za-z]{3,}|no|No|NO)\b"
)
# A number in another base, and a choice with its value.
_BASED = re.compile(r"([0-9][0-9A-F]*)_ ?(?:\{ ?([0-9]{1,2}) ?\}|([0-9]{1,2}))")
_LABELLED = re.compile(r"\(([A-J])\)[.:]? +(.+)", re.DOTALL)
_PERCENT = re.compile(r"(.*[0-9}]) ?(?:\\?%|percent|percentage|pct)", re.DOTALL)
_POWER = re.compile(r"(?<![0-9#])(#?[0-9]+) ?\^ ?(?:\{ ?(#?[0-9]+) ?\}|(#?[0-9]+))(?! ?\^)")
_FACTORIAL = re.compile(r"(?<![0-9#])(#?[0-9]+) ?!(?!=)")
_NUMBER_IN_BRACES = re.compile(r"(?<![\^_])(?<![\^_] )\{ ?(#?[0-9]+) ?\}")
_MAX_DIGITS = 1_000_000  # of a number that is computed
_MAX_TOWER = 20
_MAX_KEY_CHARS = 10_000  # the largest `env.math.max_answer_chars`
_ADJACENT_NUMBERS = re.compile(r"(?<![0-9_^])[0-9]+ +[0-9]")
_HUGE_EXPONENT = re.compile(r"[0-9.][eE][+-]?[0-9]{5,}")
_CHOICE = re.compile(r"(?:[Oo]ption |[Cc]hoice )?\(?([A-Ja-j])[).:]?\)?")


def extract_answer(completion: str, answer_format: AnswerFormat) -> str | None:
    r"""Return the answer in `completion`, stripped; None if it contains no answer.

    Formats: "boxed", the content of the last complete `\boxed{...}` or `\fbox{...}`; "last_number", the last number
    (a fraction, mixed number, power or percentage is one number); "whole", the full text; "answer_tag", the content of
    the last `<answer>...</answer>`; "hash", the rest of the line after the last `####`. All but "whole" search the last
    `SEARCHED_CHARS` characters.

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
    last = None
    for match in _NUMBER_IN_TEXT.finditer(text if text.isascii() else ascii_characters(text)):
        last = match.group()
    return last


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


def to_latex(answer: str) -> str:
    r"""Return a normalised answer in the LaTeX that the verifier reads, without its unit.

    Example:
        >>> to_latex("1.5e3"), to_latex("2 1/2"), to_latex("sqrt(2)/2 cm")
        ('1.5 \\times 10^{3}', '\\frac{5}{2}', '\\sqrt{2}/2')
    """
    if _DATE.fullmatch(answer) or is_text(answer):
        return f"\\text{{{_plain_words(answer)}}}"
    if percentage := _PERCENT.fullmatch(answer):
        number = _comma_decimal(percentage[1])  # a percentage is no list
        return f"{number.decimal if number else to_latex(percentage[1])}\\%"
    quantity = split_quantity(answer)
    literal = rational_literal(quantity.number)
    if literal is None:
        latex = plain_to_latex(quantity.number)
        return latex if quantity.scale == 1 else f"{quantity.scale} \\cdot ({latex})"
    if literal.is_ratio or quantity.scale != 1:
        value = literal.value * quantity.scale
        sign = "-" if value < 0 else ""
        return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}" if value.denominator > 1 else str(value)
    digits = literal.decimal
    return digits if not literal.exponent else f"{digits} \\times 10^{{{literal.exponent}}}"


@lru_cache(maxsize=10_000)
def is_text(answer: str) -> bool:
    """Return whether a normalised answer is words ("true", "no solution"), which algebra cannot compare."""
    words = _plain_words(answer)
    return _WORDS.fullmatch(words) is not None and _WORD.search(words) is not None


def needs_algebra(answer: str) -> bool:
    """Return whether a normalised answer is neither words nor a date nor a number with or without a unit."""
    if _DATE.fullmatch(answer) or is_text(answer):
        return False
    return rational_literal(split_quantity(answer).number) is None


@lru_cache(maxsize=10_000)
def answer_key_fault(truth: str) -> str | None:
    r"""Return why an answer key cannot be right for any completion, or None.

    Any text is an answer key, since equal text is a right answer. Keys that are cut off or contain no answer at all
    are faults of the data set.
    """
    plain = normalise(truth)
    if not plain:
        return "it is empty"
    if not braces_match(plain):
        return "its braces do not match"
    if not re.search(r"\w|\\[A-Za-z{]|\(\)|\{\}", plain):
        return "it contains no letter and no digit"
    if plain.lower() == "nan":
        return "it is not a number"
    if len(plain) <= _MAX_KEY_CHARS and _is_too_large(plain):
        return f"it contains a number of more than {_MAX_DIGITS:,} digits"
    return None


def _is_too_large(text: str) -> bool:
    """Return whether a power or a factorial of written numbers, such as `9^{9^{9^9}}`, has too many digits."""
    text = text.replace("(", "{").replace(")", "}")
    for _ in range(_MAX_TOWER):
        values: list[str] = []

        def value(match: re.Match[str], values: list[str] = values) -> str:
            base, exponent = match[1], (match[2] or match[3]) if match.re is _POWER else None
            values.append(_power(base, exponent) if exponent else _factorial(base))
            return values[-1]

        shorter = _FACTORIAL.sub(value, _POWER.sub(value, _NUMBER_IN_BRACES.sub(r"\1", text)))
        if "" in values:
            return True
        if shorter == text:
            break
        text = shorter
    return False


def _power(base: str, exponent: str) -> str:
    """Return a power in digits, or `#` and its number of digits; an empty text if that is too large."""
    if base in ("0", "1") or exponent in ("0", "1"):
        return base if exponent != "0" else "1"
    base_digits = float(base[1:]) if base[0] == "#" else math.log10(max(int(base), 1))
    digits = math.inf if exponent[0] == "#" or len(exponent) > 18 else int(exponent) * base_digits
    if digits > _MAX_DIGITS:
        return ""
    return str(int(base) ** int(exponent)) if base[0] != "#" and digits < 18 else f"#{math.ceil(digits)}"


def _factorial(number: str) -> str:
    if number[0] == "#" or len(number) > 18:
        return ""
    digits = math.lgamma(int(number) + 1) / math.log(10)
    if digits > _MAX_DIGITS:
        return ""
    return str(math.factorial(int(number))) if digits < 18 else f"#{math.ceil(digits)}"


def check_answer_keys(dataset: ProblemDataset, max_chars: int) -> None:
    """Check the answers of all problems, so that a bad one is reported before a job starts workers.

    Raises:
        DataError: An answer key is broken (see `answer_key_fault`) or too long; the message names file and line.
    """
    for index in range(len(dataset)):
        answer = dataset[index].answer
        fault = answer_key_fault(answer)
        if fault is None and len(normalise(answer)) > max_chars:
            fault = f"it has more than {max_chars} characters (env.math.max_answer_chars)"
        if fault:
            raise DataError(
                f"{dataset.where(index)}: the answer {answer[:200]!r} cannot be compared with an answer of the model: "
                f"{fault}. Correct or remove the record."
            )


def has_adjacent_numbers(latex: str) -> bool:
    """Return whether two numbers stand side by side, as in `5 6`, which math-verify would add or join."""
    return _ADJACENT_NUMBERS.search(latex) is not None


def has_huge_exponent(latex: str) -> bool:
    """Return whether a decimal has at least five digits of exponent, as in `1E811199`.

    sympy would write out all its digits: seconds of computing time, for a number that it then cannot read.
    """
    return _HUGE_EXPONENT.search(latex) is not None


def braces_match(text: str) -> bool:
    r"""Return whether each brace that is not escaped has its partner, and no backslash is at the end."""
    depth = 0
    escaped = False
    for character in text:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth < 0:
                return False
    return depth == 0 and not escaped


@dataclass(frozen=True)
class RationalLiteral:
    """A number written in digits.

    Attributes:
        value: Its exact value.
        is_ratio: It is written as a ratio or mixed number.
        digits: Significant digits of a decimal that is not an integer; 0 for other numbers, which are exact.
        decimal: A decimal's digits without groups, without the exponent.
        exponent: A decimal's power of ten.
    """

    value: Fraction
    is_ratio: bool
    digits: int = 0
    decimal: str = ""
    exponent: int = 0


@lru_cache(maxsize=10_000)  # the completions of one prompt have the same ground truth
def rational_literal(text: str) -> RationalLiteral | None:
    r"""Parse a normalised number: integer, decimal, `1.5e3`, `a/b`, `\frac{a}{b}`, `2 1/2`, `a:b`; else None."""
    if len(text) > _MAX_LITERAL_CHARS:
        return None
    if match := _RATIO.fullmatch(text):
        groups = match.groups()
        sign, whole, numerator, denominator = groups[:4] if groups[2] else groups[4:]
        if int(denominator) == 0 or (
            whole and (int(numerator) < 0 or int(denominator) < 0 or match[0][len(sign) + len(whole)] == "-")
        ):
            return None
        value = int(whole or 0) + Fraction(int(numerator), int(denominator))
        return RationalLiteral(-value if sign == "-" else value, is_ratio=True)
    if (match := _PROPORTION.fullmatch(text)) and int(match[2]):
        return RationalLiteral(Fraction(int(match[1]), int(match[2])), is_ratio=True)
    if match := _REPEATING.fullmatch(text):
        sign, integer, fixed, period = match.groups()
        period_value = Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(fixed)
        value = Fraction(int((integer + fixed) or 0), 10 ** len(fixed)) + period_value
        return RationalLiteral(-value if sign == "-" else value, is_ratio=True)
    if match := _POWER_OF_TEN.fullmatch(text):
        return _decimal_literal(match[1], "1", "", int(match[2] or match[3]))
    match = _DECIMAL.fullmatch(text)
    if match is None or not (match[2] or match[3] or match[4]):
        return None
    integer, decimals = match[3] or "", match[4] or ""
    if match[2]:
        integer, _, decimals = match[2].rpartition(",") if "," in match[2] else (match[2], "", "")
    return _decimal_literal(
        match[1], re.sub(r"[^0-9]", "", integer), decimals, int(match[5] or match[6] or match[7] or 0)
    )


def _decimal_literal(sign: str, integer: str, decimals: str, exponent: int) -> RationalLiteral:
    value = Fraction(int(integer + decimals)) * Fraction(10) ** (exponent - len(decimals))
    digits = len((integer + decimals).lstrip("0")) if decimals or exponent < 0 else 0
    number = ("-" if sign == "-" else "") + (integer or "0") + (f".{decimals}" if decimals else "")
    return RationalLiteral(-value if sign == "-" else value, False, digits, number, exponent)


def same_number(answer: RationalLiteral, truth: RationalLiteral) -> bool:
    """Return whether two numbers are equal.

    Integers, ratios and short decimals are exact. A decimal of six or more significant digits is a rounded value: it
    equals a ratio, or another such decimal, from which it differs by at most `RELATIVE_TOLERANCE`, or of which it is
    the rounded or truncated value.
    """
    if answer.value == truth.value:
        return True
    if answer.is_ratio == truth.is_ratio and min(answer.digits, truth.digits) < ROUNDED_DIGITS:
        return False
    if any(not number.is_ratio and not number.digits for number in (answer, truth)):
        return False  # an integer is exact
    if abs(answer.value - truth.value) <= RELATIVE_TOLERANCE * abs(truth.value):
        return True
    return is_rounded(answer.value, answer.digits, truth.value) or is_rounded(truth.value, truth.digits, answer.value)


def is_rounded(decimal: Fraction, digits: int, value: Fraction) -> bool:
    """Return whether a decimal of at least six significant digits is `value`, rounded or truncated to these digits."""
    if digits < ROUNDED_DIGITS or decimal * value <= 0:
        return False
    # One unit in the last place. The leading digit's place is at most one off, which the loop corrects.
    unit = Fraction(10) ** (len(str(abs(decimal).numerator)) - len(str(decimal.denominator)) - digits + 1)
    while abs(decimal) / unit >= 10**digits:
        unit *= 10
    while abs(decimal) / unit < 10 ** (digits - 1):
        unit /= 10
    return -unit < abs(decimal) - abs(value) <= unit / 2


def compare_cheaply(answer: str, truth: str) -> bool | None:
    """Return whether two normalised answers are equal; None if only computer algebra can decide.

    Where a text can be read in two ways, the reading is preferred that has the form of the truth: `3,14` is a decimal
    if the truth is one number, and a list if it is a list.
    """
    if answer == truth:
        return True
    if answer.isdecimal() and truth.isdecimal():
        if answer.lstrip("0") == truth.lstrip("0"):
            return True
        if max(len(answer), len(truth)) <= _MAX_LITERAL_CHARS:
            return False
    if (based := _compare_bases(answer, truth)) is not None:
        return based
    if _compare_labels(answer, truth) or _compare_labels(truth, answer):
        return True
    answer_choice, truth_choice = _CHOICE.fullmatch(answer), _CHOICE.fullmatch(truth)
    if answer_choice and truth_choice and answer_choice[1] == truth_choice[1]:
        return True
    if _DATE.fullmatch(truth) or is_text(truth) or _DATE.fullmatch(answer) or is_text(answer):
        return _compare_text(answer, truth)
    answer_quantity, truth_quantity = split_quantity(answer), split_quantity(truth)
    factor = unit_factor(answer_quantity, truth_quantity)
    if factor is None:
        return False
    if answer_quantity.number == truth_quantity.number:
        return factor == 1
    answer_number = rational_literal(answer_quantity.number)
    truth_number = rational_literal(truth_quantity.number)
    if answer_number is None and truth_number is not None:
        answer_number = _comma_decimal(answer_quantity.number)
    elif truth_number is None and answer_number is not None:
        truth_number = _comma_decimal(truth_quantity.number)
    if answer_number is None or truth_number is None:
        return None if factor == 1 or answer_number is None else False
    return same_number(replace(answer_number, value=answer_number.value * factor), truth_number)


def _compare_bases(answer: str, truth: str) -> bool | None:
    """Compare numbers of which one has a base, as in `1011_2`, which the other may leave out; None for other texts."""
    answer_based, truth_based = _BASED.fullmatch(answer), _BASED.fullmatch(truth)
    if answer_based and truth_based:
        return _digits_and_base(answer_based) == _digits_and_base(truth_based)
    if answer_based and truth.isdecimal():
        return answer_based[1] == truth
    if truth_based and answer.isdecimal():
        return truth_based[1] == answer
    return None


def _digits_and_base(match: re.Match[str]) -> tuple[str, int]:
    return match[1].lstrip("0"), int(match[2] or match[3])


def _compare_labels(labelled: str, other: str) -> bool:
    """Return whether `labelled` is a choice with its value, `(C) 12`, and `other` is one of the two."""
    match = _LABELLED.fullmatch(labelled)
    if match is None:
        return False
    choice = _CHOICE.fullmatch(other)
    return match[1] == choice[1] if choice else compare_cheaply(match[2], other) is True


def _compare_text(answer: str, truth: str) -> bool | None:
    return _comparable_text(answer) == _comparable_text(truth) or (None if not is_text(truth) else False)


def _comparable_text(text: str) -> str:
    return re.sub(r"[\s.,;:!?'-]+", " ", _plain_words(text)).strip().casefold()


def _plain_words(text: str) -> str:
    r"""Return the text without `\text{}`."""
    return re.sub(r"\s+", " ", _TEXT_COMMAND.sub(r"\1", text)).strip()


def _comma_decimal(text: str) -> RationalLiteral | None:
    match = _SINGLE_COMMA.fullmatch(text)
    return rational_literal(f"{match[1]}.{match[2]}") if match else None
