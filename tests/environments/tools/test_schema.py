"""Schemas of functions equal those of transformers, and calls are checked against the type hints."""

from __future__ import annotations

import re
from typing import Any, Literal, Optional, Union

import pytest
from transformers.utils import get_json_schema

from nemo_rl.environments.tools.schema import checked_arguments, parameter_hints, tool_schema


def with_every_hint(
    text: str,
    items: list[int],
    count: int = 3,
    ratio: float = 0.5,
    strict: bool = False,
    order: Literal["up", "down"] = "up",
    level: Literal[1, 2] = 1,
    names: list[str] | None = None,
    limit: Optional[int] = None,  # noqa: UP045
    key: Union[int, str] = 1,  # noqa: UP007
    weights: dict[str, float] = {},  # noqa: B006
    anything: Any = None,
    plain_list: list = [],  # noqa: B006
    plain_dict: dict = {},  # noqa: B006
) -> list[str]:
    """Describe everything.

    A second paragraph.

    Args:
        text: The text,
            which continues: here.
        items: Numbers.
        count: A number.
        ratio: A part of 1.
        strict: Whether.
        order: Direction.
        level: Depth.
        names: Names.
        limit: Most.
        key: A key.
        weights: By name.
        anything: Any.
        plain_list: A list.
        plain_dict: An object.

    Returns:
        Words.
    """
    return []


def without_arguments() -> str:
    """Return the time."""
    return "now"


@pytest.mark.parametrize("function", [with_every_hint, without_arguments])
def test_schema_equals_that_of_transformers(function) -> None:
    expected = get_json_schema(function)
    expected["function"].pop("return", None)
    assert tool_schema(function) == expected


class Library:
    def search(self, query: str) -> str:
        """Search.

        Args:
            query (str): Words: many.
        """
        return query


def test_bound_method_has_no_self() -> None:
    function = tool_schema(Library().search)["function"]
    assert function["name"] == "search"
    assert function["parameters"]["properties"] == {"query": {"type": "string", "description": "Words: many."}}


def no_docstring(text: str) -> str:
    return text


def no_hint(text) -> str:
    """Echo."""
    return text


def bad_hint(text: bytes) -> str:
    """Echo."""
    return ""


def unknown_hint(text: Missing) -> str:  # type: ignore[name-defined]  # noqa: F821
    """Echo."""
    return ""


def variadic(*text: str) -> str:
    """Echo."""
    return ""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_docstring, "no docstring"),
        (no_hint, "'text' has no type hint"),
        (bad_hint, "'text' has the type hint bytes"),
        (unknown_hint, "name 'Missing' is not defined"),
        (variadic, "cannot be described"),
    ],
)
def test_function_that_cannot_be_described(function, message: str) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        tool_schema(function)
    assert re.search(rf"{function.__name__} \(.*{__file__}:\d+\)", str(caught.value))


HINTS = parameter_hints(with_every_hint)
REQUIRED = {"text": "", "items": []}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"items": [1, 2.0]}, {"items": [1, 2]}),
        ({"ratio": 1}, {"ratio": 1.0}),
        ({"names": None}, {"names": None}),
        ({"key": "2"}, {"key": "2"}),
        ({"weights": {"a": 1}}, {"weights": {"a": 1.0}}),
        ({"anything": [{}]}, {"anything": [{}]}),
        ({"plain_list": [1, "a"]}, {"plain_list": [1, "a"]}),
        ({"level": 2}, {"level": 2}),
    ],
)
def test_arguments_get_the_types_of_their_hints(arguments, expected) -> None:
    checked = checked_arguments("f", HINTS, {**REQUIRED, **arguments})
    assert repr(checked) == repr({**REQUIRED, **expected})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "f needs the argument 'text' and 'items'"),
        ({**REQUIRED, "cuont": 1}, "f has no argument \"cuont\"; did you mean 'count'?"),
        ({**REQUIRED, "count": "3"}, "the argument 'count' of f must be an integer, not \"3\""),
        ({**REQUIRED, "count": 2.5}, "must be an integer, not 2.5"),
        ({**REQUIRED, "count": 1e999}, "must be an integer, not Infinity"),
        ({**REQUIRED, "count": True}, "must be an integer, not true"),
        ({**REQUIRED, "strict": 1}, "must be true or false, not 1"),
        ({**REQUIRED, "ratio": 10**400}, "must be a number"),
        ({**REQUIRED, "level": True}, "must be one of 1, 2, not true"),
        ({**REQUIRED, "order": "left"}, 'must be one of "up", "down", not "left"'),
        ({**REQUIRED, "limit": "x"}, "must be an integer or null"),
        ({**REQUIRED, "names": [1]}, "must be a list whose items are a string or null, not [1]"),
        ({"text": "", "items": {}}, "must be a list whose items are an integer, not {}"),
        ({**REQUIRED, "weights": {"a": "b"}}, "must be an object whose values are a number"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        checked_arguments("f", HINTS, arguments)
