"""The registries of tools and of call formats: name in the configuration -> fully qualified name.

To add a tool or a format, write its fully qualified name in the configuration, or give it a name: with a line here, or
in another distribution with an entry point of the group `nemo_rl.tools` or `nemo_rl.tool_call_formats`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from nemo_rl.distributed.workers.host import load_object
from nemo_rl.environments.tools.tool_calls import ToolCall
from nemo_rl.errors import ConfigError
from nemo_rl.utils.names import suggest_or_list

# A function, or a class that derives from `ToolSet`.
TOOLS: dict[str, str] = {
    "calculator": "nemo_rl.environments.tools.calculator.calculator",
    "mcp": "nemo_rl.environments.tools.mcp_tools.McpTools",
    "python": "nemo_rl.environments.tools.python_tool.PythonTool",
}
# A function `parse(text) -> list[ToolCall]`.
TOOL_CALL_FORMATS: dict[str, str] = {
    "hermes": "nemo_rl.environments.tools.tool_calls.parse_hermes",
    "llama3": "nemo_rl.environments.tools.tool_calls.parse_llama3",
    "mistral": "nemo_rl.environments.tools.tool_calls.parse_mistral",
    "qwen": "nemo_rl.environments.tools.tool_calls.parse_hermes",
}
_GROUPS = {"tool": "nemo_rl.tools", "call format": "nemo_rl.tool_call_formats"}


@functools.cache
def load_tool(name: str) -> Any:
    """Return the function or class of the tool `name`. Raises `ConfigError`."""
    return _load("tool", name, TOOLS)


@functools.cache
def load_call_format(name: str) -> Callable[[str], list[ToolCall]]:
    """Return the parser of the call format `name`. Raises `ConfigError`."""
    parse = _load("call format", name, TOOL_CALL_FORMATS)
    if not callable(parse):
        raise ConfigError(f"the call format {name!r} is a {type(parse).__name__}, not a function")
    return parse


def _load(kind: str, name: str, builtin: Mapping[str, str]) -> Any:
    """Import the object with a registered or a fully qualified name."""
    points = metadata.entry_points(group=_GROUPS[kind])
    known = {**{point.name: f"{point.module}.{point.attr}" for point in points}, **builtin}
    if name not in known and "." not in name:
        raise ConfigError(
            f"unknown {kind} {name!r}{suggest_or_list(name, known)}. Use a known name or `package.module.name`."
        )
    try:
        return load_object(known.get(name, name))
    except ImportError as error:
        raise ConfigError(f"the {kind} {name!r} cannot be imported: {error}") from error
