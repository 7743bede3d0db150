"""JSON schemas of functions, and the check of a call's arguments against them.

The schemas have the format of OpenAI's API and of `transformers.utils.get_json_schema`, which chat templates expect.
They follow from the type hints and from a docstring in Google's style. Supported hints: `str`, `int`, `float`, `bool`,
`None`, `Any`, `list`, `list[X]`, `dict`, `dict[str, X]`, `Literal[...]`, `X | Y` and `Optional[X]`.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union

from nemo_rl.utils.names import suggest_or_list

_SUPPORTED = "str, int, float, bool, None, Any, list[X], dict[str, X], Literal[...], X | Y"
_TYPE_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_MAX_SHOWN = 80
_SECTION = re.compile(
    r"^(Args|Arguments|Returns|Yields|Raises|Example|Examples|Note|Notes|Attributes):\s*$", re.MULTILINE
)
_ARGUMENT = re.compile(r"^(\w+)(?: \([^)]*\))?:\s*(.*)$")


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the JSON schema of a function or method that a model may call.

    Example:
        >>> def search(query: str, limit: int = 5) -> list[str]:
        ...     '''Search the library.
        ...
        ...     Args:
        ...         query: Words to look for.
        ...         limit: Most results.
        ...     '''
        ...     return []
        >>> schema = tool_schema(search)
        >>> schema["function"]["description"], schema["function"]["parameters"]["required"]
        ('Search the library.', ['query'])
        >>> schema["function"]["parameters"]["properties"]["limit"]
        {'type': 'integer', 'description': 'Most results.'}

    Raises:
        TypeError: The docstring, a type hint or a parameter cannot be described. The message names file and line.
    """
    description, described = _docstring(function)
    properties: dict[str, Any] = {}
    required: list[str] = []
    hints = parameter_hints(function)
    for name, (hint, default) in hints.items():
        try:
            properties[name] = _schema_of(hint)
        except (TypeError, IndexError):
            raise TypeError(
                f"{_place(function)}: the parameter {name!r} has the type hint {_hint_name(hint)}. Use {_SUPPORTED}."
            ) from None
        if name in described:
            properties[name]["description"] = described[name]
        if default is inspect.Parameter.empty:
            required.append(name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    return {
        "type": "function",
        "function": {"name": function.__name__, "description": description, "parameters": parameters},
    }


def parameter_hints(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Return the type hint and the default of each parameter. Raises the `TypeError` of `tool_schema`."""
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise TypeError(f"{_place(function)}: a type hint cannot be resolved: {error}") from None
    found: dict[str, tuple[Any, Any]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"{_place(function)}: {parameter} cannot be described; give every parameter a name")
        if name not in hints:
            raise TypeError(f"{_place(function)}: the parameter {name!r} has no type hint. Use {_SUPPORTED}.")
        found[name] = hints[name], parameter.default
    return found


def checked_arguments(name: str, hints: Mapping[str, tuple[Any, Any]], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call with the types of their hints: `2.0` for an `int` becomes `2`.

    Args:
        name: Name of the tool, for messages.
        hints: Result of `parameter_hints`.
        arguments: What the model passed, as decoded from JSON.

    Raises:
        ValueError: An argument is missing, unknown or of another type. The message is written for the model.
    """
    for argument in arguments:
        if argument not in hints:
            raise ValueError(f"{name} has no argument {shown(argument)}{suggest_or_list(argument, hints)}")
    missing = [
        argument
        for argument, (_, default) in hints.items()
        if default is inspect.Parameter.empty and argument not in arguments
    ]
    if missing:
        raise ValueError(f"{name} needs the argument {' and '.join(map(repr, missing))}")
    checked: dict[str, Any] = {}
    for argument, value in arguments.items():
        hint = hints[argument][0]
        try:
            checked[argument] = _converted(value, hint)
        except (TypeError, OverflowError):
            raise ValueError(
                f"the argument {argument!r} of {name} must be {_description(hint)}, not {shown(value)}"
            ) from None
    return checked


def shown(value: object) -> str:
    """Return a value as abbreviated JSON, for messages."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _converted(value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`. Raises `TypeError` or `OverflowError` if it has another type."""
    origin, parts = _parts(hint)
    if hint is Any or (isinstance(hint, type) and type(value) is hint):
        return value
    if hint is int and type(value) is float and value.is_integer():
        return int(value)
    if hint is float and type(value) is int:
        return float(value)
    if origin is Literal and any(type(value) is type(part) and value == part for part in parts):
        return value
    if origin is list and isinstance(value, list):
        return [_converted(item, parts[0]) for item in value]
    if origin is dict and isinstance(value, dict):
        return {key: _converted(item, parts[1]) for key, item in value.items()}
    if origin is Union:
        for part in sorted(parts, key=lambda part: part is not type(value)):
            try:
                return _converted(value, part)
            except TypeError:
                continue
    raise TypeError


def _schema_of(hint: Any) -> dict[str, Any]:
    origin, parts = _parts(hint)
    if hint is Any:
        return {}
    if isinstance(hint, type) and hint in _TYPE_NAMES:
        return {"type": _TYPE_NAMES[hint]}
    if hint is list:
        return {"type": "array"}
    if hint is dict:
        return {"type": "object"}
    if origin is list:
        return {"type": "array", "items": _schema_of(parts[0])}
    if origin is dict and parts[0] is str:
        return {"type": "object", "additionalProperties": _schema_of(parts[1])}
    if origin is Literal and all(type(part) in _TYPE_NAMES for part in parts):
        names = list(dict.fromkeys(_TYPE_NAMES[type(part)] for part in parts))
        return {"type": names[0] if len(names) == 1 else names, "enum": list(parts)}
    if origin is Union:
        return _schema_of_union(parts)
    raise TypeError


def _schema_of_union(parts: tuple[Any, ...]) -> dict[str, Any]:
    schemas = [_schema_of(part) for part in parts if part is not type(None)]
    if len(schemas) == 1:
        schema = schemas[0]
    elif all(schema.keys() == {"type"} for schema in schemas):
        schema = {"type": sorted(schema["type"] for schema in schemas)}
    else:
        schema = {"anyOf": schemas}
    return {**schema, "nullable": True} if type(None) in parts else schema


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    origin = typing.get_origin(hint)
    return (Union if origin is types.UnionType else origin), typing.get_args(hint)


def _description(hint: Any) -> str:
    """Return what a hint accepts, in words for the model."""
    origin, parts = _parts(hint)
    if origin is Union:
        return " or ".join(_description(part) for part in parts)
    if origin is Literal:
        return "one of " + ", ".join(shown(part) for part in parts)
    if origin is list:
        return f"a list whose items are {_description(parts[0])}"
    if origin is dict:
        return f"an object whose values are {_description(parts[1])}"
    words = {str: "a string", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
    return {**words, list: "a list", dict: "an object"}.get(hint, "any value")


def _hint_name(hint: Any) -> str:
    return hint.__qualname__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return the description of a function and those of its arguments."""
    text = inspect.getdoc(function)
    if not text:
        raise TypeError(f"{_place(function)} has no docstring; it tells the model what the tool does")
    description, *rest = _SECTION.split(text)
    sections = dict(zip(rest[::2], rest[1::2]))
    arguments: dict[str, str] = {}
    name, indent = "", 0
    for line in (sections.get("Args") or sections.get("Arguments") or "").splitlines():
        body = line.strip()
        depth = len(line) - len(line.lstrip())
        match = _ARGUMENT.match(body)
        if match and (not name or depth <= indent):
            name, indent = match[1], depth
            arguments[name] = match[2]
        elif name and body:
            arguments[name] += f" {body}"
    return description.strip(), arguments


def _place(function: Callable[..., Any]) -> str:
    """Return name, file and line of a function, for error messages."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    code = getattr(function, "__code__", None)
    where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return f"the tool {getattr(function, '__qualname__', function)}{where}"
