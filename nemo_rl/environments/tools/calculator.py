"""A calculator for models: Python's arithmetic without Python."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from nemo_rl.parsing import parse_expression

_MAX_EXPRESSION_CHARS = 1000
_MAX_BITS = 10_000  # about 3,000 decimal digits
_MAX_COUNT = 1000  # of factorial, comb and perm, and of round's digits
_CONSTANTS = {"pi": math.pi, "e": math.e, "tau": math.tau}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression with + - * / // % ** and parentheses.

    Available are also pi, e and the functions abs, min, max, sum, round, floor, ceil, sqrt, exp, log, log2, log10,
    sin, cos, tan, asin, acos, atan, degrees, radians, factorial, comb, gcd, lcm and hypot.

    Args:
        expression: The expression, such as 2 * (3 + 4) ** 2.
    """
    if len(expression) > _MAX_EXPRESSION_CHARS:
        raise ValueError(
            f"the expression has {len(expression)} characters; at most {_MAX_EXPRESSION_CHARS} are allowed"
        )
    try:
        return _text(_value(parse_expression(expression.strip())))
    except SyntaxError as error:
        raise ValueError(f"the expression cannot be read: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise ValueError("the expression is nested too deeply") from None
    except OverflowError:
        raise ValueError("a number is too large") from None
    except (TypeError, ZeroDivisionError) as error:  # a function got the wrong number of arguments
        raise ValueError(str(error)) from None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _checked(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _checked(_BINARY[type(node.op)](_value(node.left), _value(node.right)))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id not in _FUNCTIONS:
            raise ValueError(f"there is no function {node.func.id!r}")
        return _checked(_FUNCTIONS[node.func.id](*[_value(argument) for argument in node.args]))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitXor):
        raise ValueError("write ** for powers, not ^")
    if isinstance(node, ast.Tuple):
        raise ValueError("a comma separates arguments; write numbers without commas")
    raise ValueError(f"{ast.unparse(node)!r} is not arithmetic")


def _checked(number: Any) -> Any:
    """Return a number. Raises `ValueError` unless it is real, finite and of limited size."""
    if isinstance(number, complex):
        raise ValueError("the result is not a real number")
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError("a number is too large")
    if isinstance(number, int) and number.bit_length() > _MAX_BITS:
        raise ValueError("a number is too large")
    return number


def _power(base: Any, exponent: Any) -> Any:
    # Checked before it is computed: 9**9**9 has 370 million digits.
    is_integer = isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1 and exponent > 0
    if is_integer and (base.bit_length() - 1) * exponent > _MAX_BITS:
        raise ValueError("a number is too large")
    return base**exponent


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` for arguments whose result takes little time and memory."""

    def limited(*arguments: Any) -> Any:
        for argument in arguments:
            if abs(argument) > _MAX_COUNT:
                raise ValueError(f"{function.__name__} accepts numbers up to {_MAX_COUNT}")
        return function(*arguments)

    return limited


def _round(number: Any, digits: int | None = None) -> Any:
    if digits is not None and abs(digits) > _MAX_COUNT:
        raise ValueError(f"round accepts at most {_MAX_COUNT} digits")
    return round(number, digits)


def _text(number: Any) -> str:
    """Return a number as text: 0.1 + 0.2 is 0.3, and 6 / 2 is 3."""
    return str(number) if isinstance(number, int) else f"{number + 0.0:.15g}"  # + 0.0: no negative zero


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "min": lambda *numbers: min(numbers),
    "max": lambda *numbers: max(numbers),
    "sum": lambda *numbers: sum(numbers),
    "round": _round,
    "factorial": _limited(math.factorial),
    "comb": _limited(math.comb),
    **{
        name: getattr(math, name)
        for name in (
            *("floor", "ceil", "sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tan", "asin", "acos", "atan"),
            *("degrees", "radians", "gcd", "lcm", "hypot"),
        )
    },
}
