"""The calculator: results, and expressions that must not be evaluated."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nemo_rl.environments.tools.calculator import calculator


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("2 * (3 + 4) ** 2", "98"),
        (" 7 // 2 % 2 - -1 ", "2"),
        ("0.1 + 0.2", "0.3"),
        ("6 / 2", "3"),
        ("10 / 3", "3.33333333333333"),
        ("-0.0", "0"),
        ("2 ** -1", "0.5"),
        ("2 ** 64", "18446744073709551616"),
        ("sqrt(16) + gcd(12, 18) + min(3, 2)", "12"),
        ("round(pi, 2)", "3.14"),
        ("factorial(20) / factorial(18)", "380"),
        ("1_000 + 1e3", "2000"),
    ],
)
def test_result(expression: str, result: str) -> None:
    assert calculator(expression) == result


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("9**9**9", "too large"),
        ("9.0**9.0**9.0", "too large"),
        ("(2**5000)**(2**5000)", "too large"),
        ("*".join(["2**9000"] * 3), "too large"),
        ("factorial(10**9)", "up to 1000"),
        ("comb(10**9, 10**8)", "up to 1000"),
        ("round(5, -10**9)", "at most 1000 digits"),
        ("1e400", "too large"),
        ("exp(1000)", "too large"),
        ("10**400 / 3", "too large"),
        ("1 / 0", "division by zero"),
        ("(-8) ** 0.5", "not a real number"),
        ("sqrt(-1)", "domain|nonnegative"),
        ("sqrt(1, 2)", "argument"),
        ("2 ^ 3", r"write \*\* for powers"),
        ("1,000 + 1", "without commas"),
        ("2 +", "cannot be read: invalid syntax"),
        ("(" * 400 + ")" * 400, "cannot be read"),
        ("1" * 1001, "1001 characters"),
        ("", "cannot be read"),
        ("x", "'x' is not arithmetic"),
        ("True", "'True' is not arithmetic"),
        ("'a' * 9", "is not arithmetic"),
        ("[1][0]", "is not arithmetic"),
        ("().__class__", "is not arithmetic"),
        ("__import__('os')", "no function '__import__'"),
        ("(lambda: 1)()", "is not arithmetic"),
        ("abs(x=1)", "is not arithmetic"),
        ("abs(*[1])", "is not arithmetic"),
    ],
)
def test_refused_expression(expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calculator(expression)


@given(
    st.text(max_size=40)
    | st.lists(
        st.sampled_from([*"0123456789+-*/%().,", "**", "//", "factorial(", "round(", "sum(", "lcm(", "pi"]), max_size=40
    ).map("".join)
)
@example("-" * 990 + "1")
@example("1" + "+1" * 499)
@example("\0")
@example("\ud800")
def test_every_expression_has_a_result_or_a_reason(expression: str) -> None:
    try:
        result = calculator(expression)
    except ValueError as error:
        result = str(error)
    assert result
