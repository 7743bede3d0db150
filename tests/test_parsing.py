"""`nemo_rl.parsing`, and what uses it, while other threads parse in the middle of a parse."""

from __future__ import annotations

import ast
import gc
import threading
from collections.abc import Callable, Iterator

import pytest

from nemo_rl.environments.tools.calculator import calculator
from nemo_rl.parsing import parse_expression, parse_module
from nemo_rl.venvs.planning.markers import parse_marker, parse_requirement

PARSERS: dict[str, Callable[[str], object]] = {
    "module": parse_module,
    "expression": parse_expression,
    "calculator": calculator,
    "marker": lambda text: parse_marker(f"sys_platform == '{text}'"),
    "requirement": lambda text: parse_requirement(f"torch>=2; sys_platform == '{text}'"),
}


@pytest.fixture
def collector() -> Iterator[None]:
    """Restore the garbage collector's settings, and keep its callbacks of other tests apart."""
    thresholds, callbacks = gc.get_threshold(), list(gc.callbacks)
    yield
    gc.set_threshold(*thresholds)
    gc.callbacks[:] = callbacks


def errors_of_interrupted_parses(parse: Callable[[str], object]) -> list[str]:
    """Parse 150 texts. During each, at another allocation, the garbage collector lets another thread parse."""
    errors: list[str] = []
    this_thread = threading.get_ident()

    def parse_deep_inside(depth: int, text: str) -> object:
        return parse(text) if depth == 0 else parse_deep_inside(depth - 1, text)

    def interrupt(phase: str, _info: object) -> None:
        if phase == "start" and threading.get_ident() == this_thread:
            gc.set_threshold(0)
            other = threading.Thread(target=parse_deep_inside, args=(20, f"{allocations} + 2000"))
            other.start()
            other.join(timeout=0.01)  # with the lock, the other thread waits for this one
            others.append(other)

    others: list[threading.Thread] = []
    for allocations in range(1, 151):
        gc.collect(0)
        gc.callbacks.append(interrupt)
        gc.set_threshold(allocations)
        try:
            parse(f"{allocations} + 1000")
        except SystemError as error:
            errors.append(str(error))
        gc.set_threshold(0)
        gc.callbacks.remove(interrupt)
        while others:
            others.pop().join()
    return errors


@pytest.mark.parametrize("name", PARSERS)
def test_a_parse_survives_a_parse_of_another_thread_in_its_middle(name: str, collector: None) -> None:
    assert errors_of_interrupted_parses(PARSERS[name]) == []


def test_errors_of_syntax_are_raised() -> None:
    with pytest.raises(SyntaxError):
        parse_expression("1 +")
    assert ast.dump(parse_module("a = 1")) == ast.dump(ast.parse("a = 1"))
