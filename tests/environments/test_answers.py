from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.environments.answers import (
    SEARCHED_CHARS,
    AnswerFormat,
    _comma_decimal,
    compare_cheaply,
    extract_answer,
    normalise,
    rational_literal,
    to_latex,
)
from nemo_rl.environments.units import split_quantity


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"a } stray \boxed{3} {", "3"),
        (r"\boxed{3} \boxed{4", "3"),
        (r"\boxed{}", None),
        (r"\boxed 5", None),
        ("no box: 5", None),
        ("", None),
    ],
)
def test_last_complete_box(completion: str, answer: str | None) -> None:
    assert extract_answer(completion, "boxed") == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("12", "12"),
        ("3 + 4 = 7.", "7"),
        ("it is -3", "-3"),
        ("3-5", "5"),
        ("1,234,567 in all", "1,234,567"),
        ("1,2,3", "3"),
        ("pi is 3.14", "3.14"),
        (".5", ".5"),
        ("2.5e-3", "2.5e-3"),
        ("x2", None),
        ("none", None),
    ],
)
def test_last_number(completion: str, answer: str | None) -> None:
    assert extract_answer(completion, "last_number") == answer


@pytest.mark.parametrize(
    ("answer_format", "completion", "answer"),
    [
        ("whole", "  17\n", "17"),
        ("whole", " \n", None),
        ("answer_tag", "<answer>1</answer> wait <answer> 2 </answer>", "2"),
        ("answer_tag", "<answer>1", None),
        ("hash", "first 3\n#### 1,024\nbye", "1,024"),
        ("hash", "1,024", None),
    ],
)
def test_other_formats(answer_format: AnswerFormat, completion: str, answer: str | None) -> None:
    assert extract_answer(completion, answer_format) == answer


def test_only_the_end_is_searched() -> None:
    assert extract_answer(r"\boxed{1}" + "x" * SEARCHED_CHARS, "boxed") is None
    assert extract_answer("x" * 10_000_000 + r"\boxed{1}", "boxed") == "1"


@pytest.mark.parametrize("hostile", [r"\boxed{" * 2_000_000, "{}" * 2_000_000, "1," * 4_000_000, "9" * 10_000_000])
def test_extraction_takes_linear_time(hostile: str) -> None:
    # A quadratic search would run for hours, and reach the suite's time-out.
    for answer_format in ("boxed", "last_number", "whole", "answer_tag", "hash"):
        extract_answer(hostile, answer_format)
    assert extract_answer(hostile + r" \boxed{5}", "boxed") == "5"


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("12", "12"),
        ("+12", "12"),
        ("012", "12"),
        ("12.", "12"),
        ("12.0", "12"),
        ("$12$", "12"),
        ("1,000", "1000"),
        ("1 000", "1000"),
        (r"1{,}000", "1000"),
        (r"10\,000", "10000"),
        ("\u22123", "-3"),
        ("1/2", "0.5"),
        ("2/4", r"\frac{1}{2}"),
        (r"\dfrac{1}{2}", "0.50"),
        (r"-\frac{1}{2}", "-1/2"),
        (r"\frac{-1}{2}", "-1/2"),
        ("1.5e3", "1500"),
        ("1E-2", "0.01"),
        ("0.333333", "1/3"),
        ("2/3", "0.666667"),
        (r"x  +  1", "x + 1"),
    ],
)
def test_cheap_equality(answer: str, truth: str) -> None:
    assert compare_cheaply(normalise(answer), normalise(truth)) is True


@pytest.mark.parametrize(
    ("answer", "truth"),
    [("13", "12"), ("1000001", "1000000"), ("0.33", "1/3"), ("1/3", "2/3"), ("0.5000001", "0.5"), ("-5", "5")],
)
def test_cheap_inequality(answer: str, truth: str) -> None:
    assert compare_cheaply(normalise(answer), normalise(truth)) is False


@pytest.mark.parametrize(
    ("answer", "truth"),
    [("50%", "0.5"), ("x+1", "1+x"), ("1,2", "2,1"), ("1/0", "5"), ("e", "5"), (".", "5"), ("9" * 301, "5"), ("", "5")],
)
def test_algebra_is_undecided(answer: str, truth: str) -> None:
    assert compare_cheaply(answer, truth) is None


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**30))
def test_rational_literals_are_exact(numerator: int, denominator: int) -> None:
    literal = rational_literal(f"{numerator}/{denominator}")
    assert literal is not None
    assert literal.value == Fraction(numerator, denominator)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**12), max_value=10**12))
def test_decimals_are_exact(number: object) -> None:
    literal = rational_literal(f"{number:f}")
    assert literal is not None
    assert literal.value == Fraction(str(number))


@given(st.text(alphabet="0123456789.,-+/ eE$\\frac{}()", max_size=40), st.sampled_from(["5", "1/3", "-2.50"]))
def test_any_text_can_be_compared(answer: str, truth: str) -> None:
    same = compare_cheaply(normalise(answer), truth)
    number = split_quantity(normalise(answer)).number  # without the dollar sign of `-$5`
    literal, expected = rational_literal(number) or _comma_decimal(number), rational_literal(truth)
    assert expected is not None
    if literal is None:
        assert same is None
    else:
        tolerance = 0 if literal.is_ratio == expected.is_ratio else abs(expected.value) / 10**6
        assert same == (abs(literal.value - expected.value) <= tolerance)


def test_scientific_notation_becomes_latex() -> None:
    assert to_latex("1.5e3") == r"1.5 \times 10^{3}"
    assert to_latex("-2E-03") == r"-2 \times 10^{-3}"
    assert to_latex("e3") == "e3"
    assert to_latex("15") == "15"
