"""Tools and sets of tools: what a model may call, and how a call becomes the text that the model reads."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_rl.environments.tools.coroutines import completed
from nemo_rl.environments.tools.schema import checked_arguments, parameter_hints, shown, tool_schema
from nemo_rl.environments.tools.tool_calls import ToolCall
from nemo_rl.utils.names import suggest_or_list

# Exceptions of a tool that are about its arguments, so that the model reads them.
_CAUSED_BY_ARGUMENTS = (ValueError, LookupError, ArithmeticError)
_MAX_NAME_CHARS = 64


@dataclass(frozen=True)
class Tool:
    """Holds one tool.

    Attributes:
        schema: Its JSON schema; see `tool_schema`.
        run: Runs a call with the arguments that the model wrote. Raises `ValueError` if they do not fit.
    """

    schema: dict[str, Any]
    run: Callable[[dict[str, Any]], Any]

    @property
    def name(self) -> str:
        """Name that the model calls."""
        name: str = self.schema["function"]["name"]
        return name


class ToolSet:
    """Makes each public method of a subclass a tool. All objects of an episode belong to that episode alone.

    A tool raises `ValueError`, `LookupError` or `ArithmeticError` if its arguments are wrong, and the model reads the
    message. Any other exception is a failure of the environment. A tool may be a coroutine (`async def`).

    Example:
        >>> class Notes(ToolSet):
        ...     def __init__(self):
        ...         self.lines = []
        ...
        ...     def write(self, line: str) -> str:
        ...         '''Keep a line for later.'''
        ...         self.lines.append(line)
        ...         return f"{len(self.lines)} lines"
        >>> [tool.name for tool in Notes().tools()]
        ['write']
    """

    def reset(self, problem: dict[str, Any]) -> None:
        """Begin an episode with `problem`. Called once, before `tools`."""

    def tools(self) -> list[Tool]:
        """Return the tools. Raises `TypeError` if a method cannot be described."""
        names = [
            name
            for base in reversed(type(self).__mro__)
            if base not in (ToolSet, object)
            for name in vars(base)
            if not name.startswith("_") and not hasattr(ToolSet, name) and inspect.isroutine(getattr(self, name))
        ]
        return [function_tool(getattr(self, name)) for name in dict.fromkeys(names)]

    def close(self) -> None:
        """Release what the tools hold. Called once, also after a failure."""


def function_tool(function: Callable[..., Any]) -> Tool:
    """Return the tool of a function or method with type hints and a docstring. Raises the errors of `tool_schema`."""
    schema = tool_schema(function)
    hints = parameter_hints(function)
    name = schema["function"]["name"]
    return Tool(schema, lambda arguments: function(**checked_arguments(name, hints, arguments)))


class Toolbox:
    """Runs the calls of one episode.

    Example:
        >>> def double(number: int) -> int:
        ...     '''Double a number.'''
        ...     return 2 * number
        >>> toolbox = Toolbox([function_tool(double)])
        >>> toolbox.run(ToolCall("double", {"number": 4}))
        ('8', True)
        >>> toolbox.run(ToolCall("duble", {"number": 4}))
        ("Error: there is no tool 'duble'; did you mean 'double'?", False)

    Args:
        tools: The tools.
        max_output_chars: Longer results are shortened in the middle.

    Raises:
        ValueError: Two tools have the same name.
    """

    def __init__(self, tools: Sequence[Tool], max_output_chars: int = 4000) -> None:
        self._tools = {tool.name: tool for tool in tools}
        if len(self._tools) < len(tools):
            names = [tool.name for tool in tools]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two tools are named {twice!r}; rename one, or leave it out")
        self._max_output_chars = max_output_chars

    def schemas(self) -> list[dict[str, Any]]:
        """Return the JSON schemas of all tools."""
        return [tool.schema for tool in self._tools.values()]

    def run(self, call: ToolCall) -> tuple[str, bool]:
        """Return the text that the model reads, and whether the call succeeded.

        Raises only what the tool raises and its arguments do not cause; see `ToolSet`.
        """
        if call.problem:
            return self._text(f"Error: {call.problem}"), False
        tool = self._tools.get(call.name)
        if tool is None:
            hint = suggest_or_list(call.name, self._tools)
            return self._text(f"Error: there is no tool {abbreviated(call.name)!r}{hint}"), False
        try:
            result = completed(tool.run(call.arguments))
        except _CAUSED_BY_ARGUMENTS as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            return self._text(f"Error: {kind}{error}"), False
        return self._text(result), True

    def _text(self, result: object) -> str:
        """Return a result as text that can be encoded and is not too long."""
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        text = encodable(text)
        left_out = len(text) - self._max_output_chars
        if left_out <= 0:
            return text
        head, tail = (self._max_output_chars + 1) // 2, self._max_output_chars // 2
        return f"{text[:head]}\n[{left_out} characters left out]\n{text[len(text) - tail :]}"


def abbreviated(name: str) -> str:
    """Return a name that a model wrote, cut off where no name is that long."""
    return encodable(name if len(name) <= _MAX_NAME_CHARS else f"{name[:_MAX_NAME_CHARS]}...")


def encodable(text: str) -> str:
    """Return a text without lone surrogates, which JSON may contain (`"\\ud800"`) and tokenizers reject."""
    return text.encode(errors="replace").decode()


def tools_of(source: object) -> list[Tool]:
    """Return the tools of a function, a method or a `ToolSet`. Raises `TypeError` for anything else."""
    if isinstance(source, ToolSet):
        return source.tools()
    if inspect.isroutine(source):
        return [function_tool(source)]
    raise TypeError(
        f"{shown(source)} is no tool; a tool is a function, a method, or an object of a class that derives from ToolSet"
    )


def as_options(tool: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return name and options of an entry of the configuration: `name`, or `{name: ..., option: value}`."""
    if isinstance(tool, str):
        return tool, {}
    options = dict(tool)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise TypeError(f"the tool {shown(tool)} has no name; write {{name: ..., option: value}}")
    return name, options
