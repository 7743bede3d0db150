"""The exception tree."""

from __future__ import annotations

import builtins
import inspect
import pickle
import re

import pytest

from nemo_rl import errors

_LINE = re.compile(r"^ {4}(?P<indent>[│ ]*)(?:[├└]── )?(?P<name>[A-Z]\w+)(?: \((?P<mixin>\w+)\))?  ", re.MULTILINE)
CLASSES = [
    item
    for item in vars(errors).values()
    if inspect.isclass(item) and issubclass(item, Exception) and item.__module__ == errors.__name__
]


def drawn_tree() -> dict[str, tuple[type, ...]]:
    """Class name -> base classes, from the drawing in the docstring of `errors`."""
    tree: dict[str, tuple[type, ...]] = {}
    path: list[str] = []
    for line in _LINE.finditer(errors.__doc__ or ""):
        depth = len(line["indent"]) // 4 + (line["name"] != "NemoRLError")
        parent = getattr(errors, path[depth - 1]) if depth else Exception
        path[depth:] = [line["name"]]
        mixins = (getattr(builtins, line["mixin"]),) if line["mixin"] else ()
        tree[line["name"]] = (parent, *mixins)
    return tree


def test_drawing_equals_class_tree() -> None:
    assert drawn_tree() == {item.__name__: item.__bases__ for item in CLASSES}


@pytest.mark.parametrize("error_class", CLASSES)
def test_errors_survive_pickling(error_class: type[errors.NemoRLError]) -> None:
    error = error_class("the message")
    if isinstance(error, errors.VenvBuildError):
        error.node = "n1"
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is error_class
    assert str(copy) == "the message"
    assert copy.__dict__ == error.__dict__
