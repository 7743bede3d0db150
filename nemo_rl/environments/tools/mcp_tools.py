"""The tools of an MCP server (Model Context Protocol), through the package `mcp`, version 1 or 2.

The package is imported when the first server is needed, so only the venv of the environment holds it.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import functools
import importlib.util
import json
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_rl.environments.tools.coroutines import event_loop
from nemo_rl.environments.tools.schema import shown
from nemo_rl.environments.tools.tool_set import Tool, ToolSet
from nemo_rl.errors import ConfigError, EnvironmentFailure
from nemo_rl.utils.names import suggest_or_list

# JSON-RPC: the arguments of a call are wrong. Other codes mean that the server failed.
_INVALID_PARAMS = -32602


class McpTools(ToolSet):
    """Offers the tools of an MCP server that this process starts, or that runs at a URL.

    The server starts when its tools are first needed. All episodes of the process share it, and it ends with the
    process. With `shared=False` each episode has a server of its own, which ends with the episode. A server that has
    died is a failure of the environment, and the next episode starts it again.

    Example, as an entry of `tools` in the configuration::

        {name: mcp, command: [uvx, mcp-server-time], include: [get_current_time]}

    Args:
        command: Program and arguments of a server that uses standard input and output.
        url: Address of a server that uses streamable HTTP, instead of `command`.
        env: Environment variables of the server, in addition to PATH and the like.
        cwd: Working directory of the server.
        include: Names of the tools that the model may call; None means all.
        shared: Whether all episodes of the process use one server.
        timeout_s: Longest time for a start or a call, in seconds.

    Raises:
        ConfigError: The package `mcp` is missing, or not exactly one of `command` and `url` is given.
    """

    def __init__(
        self,
        command: Sequence[str] = (),
        url: str = "",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        include: Sequence[str] | None = None,
        shared: bool = True,
        timeout_s: float = 60.0,
    ) -> None:
        if bool(command) == bool(url):
            raise ConfigError("the tool `mcp` needs either `command` or `url`, the address of a running server")
        if isinstance(command, str):
            raise ConfigError(f"`command` of the tool `mcp` is a list of words, not {command!r}")
        if importlib.util.find_spec("mcp") is None:
            raise ConfigError("the tool `mcp` needs the package mcp: add it to the Python of the environment")
        self._server = _Server(tuple(command), url, tuple((env or {}).items()), cwd, timeout_s)
        self._include = include
        self._shared = shared
        self._connection: _Connection | None = None

    def tools(self) -> list[Tool]:
        """Return the tools that the server lists and `include` names. Starts the server."""
        tools = {tool["name"]: tool for tool in self._connect().tools}
        for name in self._include or ():
            if name not in tools:
                raise ConfigError(f"{self._server} has no tool {name!r}{suggest_or_list(name, tools)}")
        return [self._tool(tools[name]) for name in (tools if self._include is None else self._include)]

    def close(self) -> None:
        """End the server if it belongs to this episode alone."""
        if not self._shared and self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> _Connection:
        if self._shared:
            return _shared_connection(self._server)
        if self._connection is None:
            self._connection = _Connection(self._server)
        return self._connection

    def _tool(self, description: dict[str, Any]) -> Tool:
        parameters = description["inputSchema"]
        function = {
            "name": description["name"],
            "description": description.get("description") or "",
            "parameters": parameters,
        }

        def run(arguments: dict[str, Any]) -> str:
            _check_names(description["name"], parameters, arguments)
            return self._call(description["name"], arguments)

        return Tool({"type": "function", "function": function}, run)

    def _call(self, name: str, arguments: dict[str, Any]) -> str:
        connection = self._connect()
        try:
            result = _plain(connection.wait(connection.session.call_tool(name, arguments)))
        except Exception as error:
            code = getattr(getattr(error, "error", None), "code", None)
            if code == _INVALID_PARAMS:
                raise ValueError(str(error)) from None
            self._drop(connection)
            raise EnvironmentFailure(f"the tool {name!r} of {self._server} failed: {_reason(error)}") from error
        parts = result.get("content") or []
        text = "\n".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in parts)
        if not parts and result.get("structuredContent") is not None:
            text = json.dumps(result["structuredContent"], ensure_ascii=False)
        if result.get("isError"):
            raise ValueError(text)
        return text

    def _drop(self, connection: _Connection) -> None:
        """Close a connection that has failed, so that the next call starts the server again."""
        if self._shared:
            with _lock:
                if _connections.get(self._server) is connection:
                    del _connections[self._server]
        else:
            self._connection = None
        connection.close()


@dataclass(frozen=True)
class _Server:
    command: tuple[str, ...]
    url: str
    env: tuple[tuple[str, str], ...]
    cwd: str | None
    timeout_s: float

    def __str__(self) -> str:
        return f"the MCP server {self.url or ' '.join(self.command)}"


class _Connection:
    """A session with a server. Raises `EnvironmentFailure` if the server does not start.

    One task opens and closes the session, as anyio demands. Other tasks make the calls.

    Attributes:
        session: The `mcp.ClientSession`.
        tools: The server's tools, as in its JSON.
    """

    session: Any
    tools: list[dict[str, Any]]

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._closing = asyncio.Event()
        self._task = asyncio.run_coroutine_threadsafe(self._serve(), event_loop())
        try:
            self._ready.result(server.timeout_s)
        except Exception as error:
            self.close()
            raise EnvironmentFailure(f"{server} does not start: {_reason(error)}") from error

    def wait(self, call: Coroutine[Any, Any, Any]) -> Any:
        """Return the result of a coroutine of the session."""
        future = asyncio.run_coroutine_threadsafe(call, event_loop())
        try:
            return future.result(self._server.timeout_s)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise TimeoutError(f"no answer within {self._server.timeout_s:g} s") from None

    def close(self) -> None:
        """End the session and the server. Idempotent."""
        event_loop().call_soon_threadsafe(self._closing.set)
        if not self._ready.done():
            self._task.cancel()
        # A session that has failed raises again when it ends.
        with contextlib.suppress(Exception, concurrent.futures.CancelledError):
            self._task.result(self._server.timeout_s)

    async def _serve(self) -> None:
        from mcp import ClientSession

        try:
            async with contextlib.AsyncExitStack() as stack:
                streams = await stack.enter_async_context(_transport(self._server))
                self.session = await stack.enter_async_context(ClientSession(streams[0], streams[1]))
                await self.session.initialize()
                self.tools = await self._list_tools()
                self._ready.set_result(None)
                await self._closing.wait()
        except Exception as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    async def _list_tools(self) -> list[dict[str, Any]]:
        from mcp.types import PaginatedRequestParams

        tools: list[dict[str, Any]] = []
        page = _plain(await self.session.list_tools())
        while True:
            tools += page["tools"]
            if not page.get("nextCursor"):
                return tools
            page = _plain(await self.session.list_tools(params=PaginatedRequestParams(cursor=page["nextCursor"])))


_lock = threading.Lock()
_connections: dict[_Server, _Connection] = {}


def _shared_connection(server: _Server) -> _Connection:
    with _lock:
        if server not in _connections:
            _close_at_exit()
            _connections[server] = _Connection(server)
        return _connections[server]


@functools.cache
def _close_at_exit() -> None:
    @atexit.register
    def close() -> None:
        for connection in _connections.values():
            connection.close()


def _transport(server: _Server) -> Any:
    """Return the context manager of the streams to a server."""
    if not server.url:
        from mcp import StdioServerParameters
        from mcp.client.stdio import stdio_client

        program, *arguments = server.command
        return stdio_client(
            StdioServerParameters(command=program, args=arguments, env=dict(server.env), cwd=server.cwd)
        )
    from mcp.client import streamable_http

    # The first is the older name.
    connect = getattr(streamable_http, "streamable_http_client", None) or streamable_http.streamablehttp_client
    return connect(server.url)


def _check_names(name: str, parameters: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` for arguments that the schema does not name, or that are missing. The server checks types."""
    properties = parameters.get("properties", {})
    if not parameters.get("additionalProperties"):
        for argument in arguments:
            if argument not in properties:
                raise ValueError(f"{name} has no argument {shown(argument)}{suggest_or_list(argument, properties)}")
    missing = [argument for argument in parameters.get("required", ()) if argument not in arguments]
    if missing:
        raise ValueError(f"{name} needs the argument {' and '.join(map(repr, missing))}")


def _plain(result: Any) -> dict[str, Any]:
    """Return a result with the names of the protocol, which versions of the package spell differently."""
    plain: dict[str, Any] = result.model_dump(by_alias=True, mode="json")
    return plain


def _reason(error: BaseException) -> str:
    """Return the message of an error, or of the first one of a group."""
    while getattr(error, "exceptions", None):
        error = error.exceptions[0]  # type: ignore[attr-defined]
    return f"{type(error).__name__}: {error}"
