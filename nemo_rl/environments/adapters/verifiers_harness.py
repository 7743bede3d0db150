"""The chat program of `verifiers`, run in this process instead of a subprocess.

The program is that of verifiers' harness `null`: it sends the prompt, runs the calls of the task's tools, and ends with
an answer without calls. As a subprocess it would need packages from the network, and seconds for their import.
"""

from __future__ import annotations

import argparse
import functools
import json
import ssl
import types
from typing import Any

import certifi
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.null import NullHarness
from verifiers.v1.harnesses.utils.launch import CHAT_PROGRAM_SOURCE
from verifiers.v1.runtimes import ProgramResult, Runtime

__all__ = ["InProcessHarness"]


class InProcessHarness(NullHarness):
    """Runs each segment of a rollout as a coroutine."""

    async def setup(self, runtime: Runtime) -> None:
        """Do nothing: the program's packages are those of this process."""

    async def launch(
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: Any,
        tool_interception_url: str | None = None,
    ) -> ProgramResult:
        """Run the program to its end."""
        system_prompt, prompt = self.resolve_prompt(data)
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        arguments = argparse.Namespace(
            base_url=endpoint,
            api_key=secret,
            model=ctx.model,
            system_prompt=system_prompt,
            prompt=prompt,
            initial_messages_file=None,
            mcp_config=json.dumps({"mcpServers": servers}) if servers else None,
            tool_interception_url=tool_interception_url,
            bash=False,
            compaction=False,
            summarize_at_tokens=None,
            edit=False,
            search=False,
            serper_key="",
        )
        if isinstance(prompt, list):
            arguments.initial_messages_file = runtime.workdir / f".messages-{trace.id}.json"
            arguments.initial_messages_file.write_text(json.dumps([message_to_wire(message) for message in prompt]))
        program = types.ModuleType("verifiers_chat_program")
        exec(_code(), vars(program))
        program.parse_args = lambda: arguments  # type: ignore[attr-defined]
        program.certifi = types.SimpleNamespace(where=_tls_context)  # type: ignore[attr-defined]
        try:
            await program.main()
        except SystemExit as end:
            return ProgramResult(exit_code=int(end.code or 0), stdout="", stderr=str(end.__cause__))
        return ProgramResult(exit_code=0, stdout="", stderr="")


@functools.cache
def _tls_context() -> ssl.SSLContext:
    """Return what the program's HTTP clients share. A context of its own would take 40 ms of each turn."""
    return ssl.create_default_context(cafile=certifi.where())


@functools.cache
def _code() -> types.CodeType:
    return compile(CHAT_PROGRAM_SOURCE, "verifiers_chat_program.py", "exec")
