"""The tool `mcp` against real servers, with both versions of the package that environments use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.environments.tools.mcp_tools import McpTools
from nemo_rl.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]

SERVER = """
import os, sys
try:
    from mcp.server import MCPServer as Server
    from mcp.server.mcpserver.exceptions import ToolError
except ImportError:
    from mcp.server.fastmcp import FastMCP as Server
    from mcp.server.fastmcp.exceptions import ToolError

server = Server("shop")
sold = []

@server.tool()
def sell(item: str, count: int = 1) -> str:
    '''Sell items.'''
    if item == "soup":
        raise ToolError("there is no soup")
    sold.extend([item] * count)
    return f"{len(sold)} sold"

@server.tool()
def process() -> int:
    '''Return the id of the process.'''
    return os.getpid()

@server.tool()
def crash() -> str:
    '''Crash.'''
    os._exit(1)

if sys.argv[1:]:
    import uvicorn
    uvicorn.run(server.streamable_http_app(), port=int(sys.argv[1]), log_level="error")
else:
    server.run()
"""

PROGRAM = """
import json, os, socket, subprocess, sys, time

from nemo_rl.environments.tools.mcp_tools import McpTools
from nemo_rl.environments.tools.tool_calls import ToolCall
from nemo_rl.environments.tools.tool_set import Toolbox
from nemo_rl.errors import ConfigError, EnvironmentFailure

command = [sys.executable, "server.py"]
found = {}

def box(**options):
    tools = McpTools(**{"command": command, **options})
    return tools, Toolbox(tools.tools())

def failure(function, *arguments):
    try:
        function(*arguments)
    except (ConfigError, EnvironmentFailure) as error:
        return f"{type(error).__name__}: {error}"

first, toolbox = box()
found["schemas"] = toolbox.schemas()
calls = [ToolCall("sell", {"item": "tea", "count": 2}), ToolCall("sell", {"item": "soup"}), ToolCall("sell"),
         ToolCall("sell", {"item": "tea", "number": 1}), ToolCall("sell", {"item": "tea", "count": "x"})]
found["results"] = [toolbox.run(call) for call in calls]
first.close()
_, other = box()
found["shared"] = other.run(ToolCall("sell", {"item": "tea"}))
server = int(other.run(ToolCall("process"))[0])
found["crash"] = failure(other.run, ToolCall("crash"))
_, again = box()
found["restarted"] = again.run(ToolCall("sell", {"item": "tea"}))

alone, toolbox = box(shared=False)
found["own"] = toolbox.run(ToolCall("sell", {"item": "tea"}))
server = int(toolbox.run(ToolCall("process"))[0])
alone.close()
found["ended"] = not os.path.exists(f"/proc/{server}")

found["included"] = [schema["function"]["name"] for schema in box(include=["process"])[1].schemas()]
found["unknown"] = failure(lambda: box(include=["proces"]))
found["no program"] = failure(lambda: box(command=["/nonexistent/server"]))
found["exits"] = failure(lambda: box(command=[sys.executable, "-c", "pass"]))
found["env"] = box(env={"WORD": "hi"}, shared=False)[1].run(ToolCall("sell", {"item": "tea"}))[1]

with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
web = subprocess.Popen([*command, str(port)])
while True:
    assert web.poll() is None
    try:
        socket.create_connection(("127.0.0.1", port)).close()
        break
    except OSError:
        time.sleep(0.1)
tools, toolbox = box(command=(), url=f"http://127.0.0.1:{port}/mcp", shared=False)
found["http"] = toolbox.run(ToolCall("sell", {"item": "tea"}))
tools.close()
web.terminate()
web.wait()

found["last"] = int(again.run(ToolCall("process"))[0])
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not on PATH")
@pytest.mark.parametrize("version", ["mcp<2", "mcp>=2"])
def test_tools_of_a_server(version: str, tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    uv = ["uv", "run", "--no-project", "--python", sys.executable, "--with", version]
    if subprocess.run([*uv, "python", "-c", "import mcp"], capture_output=True, cwd=tmp_path, check=False).returncode:
        pytest.skip(f"uv cannot install {version} here")
    done = subprocess.run(
        [*uv, "env", f"PYTHONPATH={REPOSITORY}", "python", "program.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    sell = found["schemas"][0]["function"]
    assert (sell["name"], sell["description"]) == ("sell", "Sell items.")
    assert sell["parameters"]["required"] == ["item"]
    assert sell["parameters"]["properties"]["count"]["type"] == "integer"
    results = found["results"]
    assert results[0] == ["2 sold", True]
    assert not results[1][1]
    assert "there is no soup" in results[1][0]
    assert results[2] == ["Error: sell needs the argument 'item'", False]
    assert results[3][0].startswith('Error: sell has no argument "number"; ')
    assert not results[4][1]
    assert "count" in results[4][0]
    assert found["shared"] == ["3 sold", True]
    assert found["crash"].startswith("EnvironmentFailure: the tool 'crash' of the MCP server ")
    assert found["restarted"] == ["1 sold", True]
    assert found["own"] == ["1 sold", True]
    assert found["ended"]
    assert found["included"] == ["process"]
    assert "has no tool 'proces'; did you mean 'process'?" in found["unknown"]
    assert found["no program"].startswith("EnvironmentFailure: the MCP server /nonexistent/server does not start: ")
    assert "does not start" in found["exits"]
    assert found["env"]
    assert found["http"] == ["1 sold", True]
    assert not Path(f"/proc/{found['last']}").exists(), "the server has outlived its process"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either `command` or `url`"),
        ({"command": ["a"], "url": "http://localhost"}, "either `command` or `url`"),
        ({"command": "server --stdio"}, "is a list of words, not 'server --stdio'"),
        ({"command": ["server"]}, "needs the package mcp"),
    ],
)
def test_wrong_options_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        McpTools(**options)
