"""Tool calls in the text that a model wrote: parsing and, for tests and scripted policies, rendering.

========  ===========================================  ==============================================================
format    models                                       text
========  ===========================================  ==============================================================
hermes    Qwen, Hermes, and most models without one    ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``,
          of their own                                 any number of times, with other text around them
llama3    Llama 3.1 and later                          ``{"name": ..., "parameters": {...}}`` as all of the text;
                                                       several are separated by ``;``
mistral   Mistral before version 11 of its tokenizer   ``[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]``
========  ===========================================  ==============================================================

Special tokens are not part of an action's text, so ``<|python_tag|>`` and ``[TOOL_CALLS]`` may be missing.
Text that is no call is a final answer. Text that starts like a call but cannot be read becomes a call with a `problem`,
which the model is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_MAX_DEPTH = 64
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG, _TOOL_CALLS = "<|python_tag|>", "[TOOL_CALLS]"
_LLAMA_CALL = re.compile(r'\{\s*"(name|type|function|parameters)"\s*:')
_MISTRAL_CALL = re.compile(r'\[\s*\{\s*"(name|arguments|id)"\s*:')
_SPACE = re.compile(r"\s*")
_BETWEEN_LLAMA_CALLS = re.compile(r"[\s;]*")


@dataclass(frozen=True)
class ToolCall:
    """Holds one call that a model wrote.

    Attributes:
        name: Name of the tool.
        arguments: Its arguments, as decoded from JSON.
        id: Id that the model gave to the call; empty if it gave none.
        problem: Why the text is no valid call; empty if it is one.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    id: str = ""
    problem: str = ""


def parse_hermes(text: str) -> list[ToolCall]:
    """Return the calls between `<tool_call>` and `</tool_call>`.

    Example:
        >>> parse_hermes('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
        [ToolCall(name='add', arguments={'a': 1}, id='', problem='')]
        >>> parse_hermes("The answer is 2.")
        []
    """
    calls: list[ToolCall] = []
    position = text.find(_OPEN)
    while position >= 0:
        position += len(_OPEN)
        try:
            value, end = _decode(text, position)
        except ValueError as error:
            calls.append(_malformed(error, 'Write <tool_call>{"name": ..., "arguments": {...}}</tool_call>.'))
        else:
            # Only now search for the closing tag: an argument may contain one.
            position = _SPACE.match(text, end).end()  # type: ignore[union-attr]
            closed = text.startswith(_CLOSE, position) or position == len(text)
            calls.append(_call(value) if closed else _malformed("there is more text after the JSON object"))
        position = text.find(_OPEN, position)
    return calls


def parse_llama3(text: str) -> list[ToolCall]:
    """Return the calls of a text that consists of JSON objects with `name` and `parameters`.

    Example:
        >>> parse_llama3('{"name": "add", "parameters": {"a": 1}}')
        [ToolCall(name='add', arguments={'a': 1}, id='', problem='')]
        >>> parse_llama3('{"name": "Ada", "born": 1815}')
        []
    """
    text, tag = _after(_PYTHON_TAG, text, _LLAMA_CALL)
    if not tag and not _LLAMA_CALL.match(text):
        return []
    calls: list[ToolCall] = []
    position = 0
    while position < len(text):
        try:
            value, position = _decode(text, position)
        except ValueError as error:
            calls.append(_malformed(error, 'Write {"name": ..., "parameters": {...}} and nothing else.'))
            break
        if isinstance(value, dict) and isinstance(value.get("function"), dict):
            value = value["function"]
        if not tag and not calls and not (isinstance(value, dict) and value.keys() & {"parameters", "arguments"}):
            return []
        calls.append(_call(value))
        position = _BETWEEN_LLAMA_CALLS.match(text, position).end()  # type: ignore[union-attr]
    return calls


def parse_mistral(text: str) -> list[ToolCall]:
    """Return the calls of the JSON list after `[TOOL_CALLS]`, or of a text that is such a list.

    Example:
        >>> parse_mistral('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "a1b2c3d4e"}]')
        [ToolCall(name='add', arguments={'a': 1}, id='a1b2c3d4e', problem='')]
    """
    text, tag = _after(_TOOL_CALLS, text, _MISTRAL_CALL)
    if not tag and not _MISTRAL_CALL.match(text):
        return []
    try:
        values, end = _decode(text, 0)
        if end != len(text):
            raise ValueError("there is more text after the JSON list")
        if not isinstance(values, list) or not values:
            raise ValueError("it is no list of calls")
    except ValueError as error:
        return [_malformed(error, 'Write [TOOL_CALLS] [{"name": ..., "arguments": {...}}].')]
    return [_call(value) for value in values]


def _after(tag: str, text: str, call: re.Pattern[str]) -> tuple[str, bool]:
    """Return the text after `tag` and True, or all of the text and False if it has no tag or begins with a call."""
    text = text.strip()
    if tag not in text or call.match(text):
        return text, False
    return text.partition(tag)[2].strip(), True


def render_calls(calls: Sequence[ToolCall], call_format: str = "hermes") -> str:
    """Return the text that a model would write for `calls`: the inverse of the parser of a built-in format.

    Example:
        >>> render_calls([ToolCall("add", {"a": 1})], "llama3")
        '{"name": "add", "parameters": {"a": 1}}'
    """
    return _RENDERERS[call_format](calls)


def _render_hermes(calls: Sequence[ToolCall]) -> str:
    return "\n".join(f"{_OPEN}\n{_json(call, 'arguments')}\n{_CLOSE}" for call in calls)


def _render_llama3(calls: Sequence[ToolCall]) -> str:
    return "; ".join(_json(call, "parameters") for call in calls)


def _render_mistral(calls: Sequence[ToolCall]) -> str:
    return f"{_TOOL_CALLS} [{', '.join(_json(call, 'arguments') for call in calls)}]" if calls else ""


_RENDERERS: dict[str, Callable[[Sequence[ToolCall]], str]] = {
    "hermes": _render_hermes,
    "llama3": _render_llama3,
    "mistral": _render_mistral,
}


def _json(call: ToolCall, arguments: str) -> str:
    record: dict[str, Any] = {"name": call.name, arguments: call.arguments}
    if call.id:
        record["id"] = call.id
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _decode(text: str, position: int) -> tuple[Any, int]:
    """Decode the JSON value at `position` or after white space. Returns it and its end. Raises `ValueError`."""
    try:
        value, end = _DECODER.raw_decode(text, _SPACE.match(text, position).end())  # type: ignore[union-attr]
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level, depth = [value], 0
    while level := [item for part in level for item in _items(part)]:
        depth += 1
        if depth > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
    return value, end


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _call(value: Any) -> ToolCall:
    """Return the call that a decoded JSON value describes."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return _malformed('it has no "name"')
    arguments = value.get("arguments", value.get("parameters")) or {}
    if isinstance(arguments, str):  # as in OpenAI's API
        try:
            arguments, _ = _decode(arguments, 0)
        except ValueError as error:
            return ToolCall(value["name"], problem=_malformed(error).problem)
    if not isinstance(arguments, dict):
        return ToolCall(value["name"], problem=_malformed("its arguments are no JSON object").problem)
    return ToolCall(value["name"], arguments, value["id"] if isinstance(value.get("id"), str) else "")


def _malformed(reason: object, advice: str = "") -> ToolCall:
    return ToolCall("", problem=f"the tool call cannot be read: {reason}. {advice}".strip())
