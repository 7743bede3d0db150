r"""Decides whether two sympy expressions are equal. Imported in verify processes only, since sympy is slow to import.

`math_verify.grader` compares structure (sets, intervals, equations); this module replaces three of its functions:

* `sympy_numeric_eq` and `sympy_symbolic_eq` use `(a - b).evalf(chop=True)` and absolute rounding. So small numbers are
  equal to each other, and large ones must have the same sixth decimal. See `equal_values`.
* `sympy_deep_compare_set_and_tuple` sorts both sets by a key that differs between `1/3` and `0.333333`. See
  `equal_collections`.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended.sets import FiniteSet
from math_verify import grader
from sympy import Basic, Float, Integer, MatrixBase, Rational
from sympy.matrices.expressions.matexpr import MatrixExpr

from nemo_rl.environments.answers import RELATIVE_TOLERANCE, ROUNDED_DIGITS, RationalLiteral, is_rounded, same_number

_MAX_MATCHED = 30
_TOLERANCE = Rational(RELATIVE_TOLERANCE.numerator, RELATIVE_TOLERANCE.denominator)
_FORMULA_TOLERANCE = 5 * _TOLERANCE  # a coefficient with six significant digits, rounded
# Points at which two formulas are compared before they are simplified. Positive, so that roots and logarithms are real.
_SAMPLES = (Rational(137, 89), Rational(211, 397))


def install() -> None:
    """Replace the functions of math-verify by those of this module."""
    grader.sympy_numeric_eq = _numeric_eq
    grader.sympy_symbolic_eq = lambda a, b: False
    grader.sympy_deep_compare_set_and_tuple = equal_collections


def _numeric_eq(truth: Any, answer: Any, float_rounding: int, numeric_precision: int) -> bool:
    return equal_values(truth, answer)


def equal_values(truth: Basic | MatrixBase, answer: Basic | MatrixBase) -> bool:
    """Return whether two numbers, formulas or matrices are equal.

    Without decimals the decision is exact. Decimals are read as exact fractions first; if the values then differ, they
    may differ by `RELATIVE_TOLERANCE`, or one may be the rounded value of the other. `50%` equals `0.5`. If only one
    side has the percent sign, the sign is also read as a unit that the other side leaves out: `50` equals the truth
    `50%`, and `50%` equals the truth `50`. (`0.5%` does not equal the truth `0.5`: a sign that the truth lacks is a
    unit only of a number from 1.)
    """
    if isinstance(truth, (MatrixBase, MatrixExpr)) or isinstance(answer, (MatrixBase, MatrixExpr)):
        expected, given = truth.doit(), answer.doit()
        if not (isinstance(expected, MatrixBase) and isinstance(given, MatrixBase)):
            return bool(expected == given)
        return expected.shape == given.shape and all(map(equal_values, expected.flat(), given.flat()))
    truth_percent, answer_percent = grader.get_pct_val(truth), grader.get_pct_val(answer)
    if (truth_percent is None) != (answer_percent is None):
        # "0.5%" is not 0.5: an added sign is a unit only for a number that can be a percentage.
        number = truth if answer_percent is not None else truth_percent
        is_unit = answer_percent is None or (number.is_number and bool(abs(number.doit()) >= 1))
        if is_unit and _equal(
            truth if truth_percent is None else truth_percent, answer if answer_percent is None else answer_percent
        ):
            return True
    return _equal(truth, answer)


def equal_collections(gold: Any, pred: Any, float_rounding: int = 6, numeric_precision: int = 15) -> bool:
    """Return whether two sets or tuples have equal elements. Two sets of at most `_MAX_MATCHED` elements match in any
    order; everything else is compared position by position."""
    if len(gold) != len(pred):
        return False
    truths, answers = list(gold.args), list(pred.args)
    if isinstance(gold, sympy.Tuple) and isinstance(pred, FiniteSet) and hasattr(pred, "_unsorted_args"):
        answers = list(pred._unsorted_args)  # a list without brackets, in the order in which it was written

    def equal(truth: Any, answer: Any) -> bool:
        return bool(grader.sympy_expr_eq(truth, answer, float_rounding, numeric_precision))

    if not (isinstance(gold, sympy.FiniteSet) and isinstance(pred, sympy.FiniteSet)) or len(truths) > _MAX_MATCHED:
        return all(map(equal, truths, answers))
    for truth in truths:
        position = next((i for i, answer in enumerate(answers) if equal(truth, answer)), None)
        if position is None:
            return False
        del answers[position]
    return True


def _equal(truth: Basic, answer: Basic) -> bool:
    has_decimals = truth.has(Float) or answer.has(Float)
    try:
        expected, given = _exact(truth), _exact(answer)
    except MemoryError:
        return False  # a number too large for the memory limit, such as 2^{2^{40}}; the process can continue
    if expected == given:
        return True
    if isinstance(expected, Rational) and isinstance(given, Rational):
        return has_decimals and same_number(_literal(answer, given), _literal(truth, expected))
    symbols = sorted(expected.free_symbols | given.free_symbols, key=str)
    if symbols:
        return _equal_formulas(expected, given, symbols, has_decimals)
    difference = given - expected
    is_zero = _is_zero(difference)
    if is_zero is not None and (is_zero or not has_decimals):
        return is_zero
    if has_decimals:
        return _close(expected, given) or _rounded(truth, expected, given) or _rounded(answer, given, expected)
    return sympy.simplify(difference).is_zero is True


def _exact(expression: Basic) -> Any:
    """Evaluate an expression, with decimals as exact fractions."""
    replacements: dict[Basic, Basic] = {number: Rational(str(number)) for number in expression.atoms(Float)}
    # The parser makes i a variable, and gives the variables of one text other assumptions than those of another.
    symbols = {symbol for symbol in expression.free_symbols if type(symbol) is sympy.Symbol}
    i_is_imaginary = not {symbol.name for symbol in symbols} & {"j", "k", "n"}
    for symbol in symbols:
        is_i = symbol.name == "i" and i_is_imaginary
        replacements[symbol] = sympy.I if is_i else sympy.Symbol(symbol.name, real=True)
    return expression.xreplace(replacements).doit()


def _literal(written: Basic, value: Rational) -> RationalLiteral:
    return RationalLiteral(
        Fraction(int(value.p), int(value.q)),
        is_ratio=not written.has(Float) and not isinstance(value, Integer),
        digits=_digits(written) or (ROUNDED_DIGITS if written.has(Float) and not isinstance(written, Float) else 0),
    )


def _digits(number: Basic) -> int:
    """Return the significant digits of a decimal, without trailing zeros; 0 for anything else."""
    if not isinstance(number, Float):
        return 0
    return len(str(abs(number)).lower().partition("e")[0].replace(".", "").strip("0"))


def _is_zero(difference: Any) -> bool | None:
    """Return whether an exact number is zero. None if it cannot be evaluated.

    The precision grows until a digit is certain, or until it exceeds what numbers of this size can cancel.
    """
    digits = 100 + 4 * sum(number.p.bit_length() // 3 for number in difference.atoms(Integer))
    value = difference.evalf(5, maxn=digits)
    if not value.is_number or value.has(sympy.nan, sympy.zoo):
        return None
    parts = [part for part in value.as_real_imag() if part != 0]
    if not all(isinstance(part, Float) for part in parts):
        return None if any(not part.is_infinite for part in parts) else False
    return not any(part._prec > 1 for part in parts)


def _close(expected: Any, given: Any, tolerance: Rational = _TOLERANCE) -> bool:
    x, y = expected.evalf(30, maxn=1000), given.evalf(30, maxn=1000)
    if not (x.is_number and y.is_number) or not (x.is_finite and y.is_finite):
        return False
    return bool(abs(x - y) <= tolerance * abs(x))


def _rounded(written: Basic, decimal: Any, value: Any) -> bool:
    digits = _digits(written)
    number = value.evalf(40, maxn=1000)
    if not digits or not isinstance(number, Float):
        return False
    exact = Rational(number)
    return is_rounded(Fraction(int(decimal.p), int(decimal.q)), digits, Fraction(int(exact.p), int(exact.q)))


def _equal_formulas(expected: Any, given: Any, symbols: list[Any], has_decimals: bool) -> bool:
    """Compare two formulas: at sample points, which shows most differences in little time, then symbolically."""
    for shift, sample in enumerate(_SAMPLES):
        point = {symbol: sample + Rational(position + shift, 7) for position, symbol in enumerate(symbols)}
        x, y = expected.subs(point), given.subs(point)
        differs = x.is_number and y.is_number and _is_zero(x - y) is False
        if differs and not (has_decimals and _close(x, y, _FORMULA_TOLERANCE)):
            return False
    if has_decimals:
        try:
            polynomials = sympy.Poly(expected, *symbols).as_dict(), sympy.Poly(given, *symbols).as_dict()
        except sympy.PolynomialError:
            pass
        else:
            return polynomials[0].keys() == polynomials[1].keys() and all(
                _close(coefficient, polynomials[1][powers], _FORMULA_TOLERANCE)
                for powers, coefficient in polynomials[0].items()
            )
    return sympy.simplify(expected - given).is_zero is True
