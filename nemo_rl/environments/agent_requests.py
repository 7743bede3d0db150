"""Requests to `chat/completions` and their answers, in the form of OpenAI's API. Needs only the standard library."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_rl.environments.agent import Model

_MAX_CHOICES = 128
_IGNORED_VALUES: dict[str, tuple[Any, ...]] = {
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "auto", "none"),
    "stop": (None, [], ""),
    "logprobs": (None, False),
    "functions": (None, []),
}
_ADVICE = {
    "response_format": "ask for the format in the prompt, and parse the text",
    "tool_choice": "let the model choose (auto)",
    "stop": "set policy.generation.stop_strings in the training job",
    "logprobs": "the training job keeps them in the rollouts of the run",
    "functions": "use tools",
}


class RequestRefused(Exception):
    """The API answers a request with an error.

    Attributes:
        status: HTTP status.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ChatRequest:
    """Holds what a request asks for.

    Attributes:
        messages: The conversation in the form that chat templates expect: contents are text, and arguments of calls are
            objects.
        tools: JSON schemas of the tools.
        calls_tools: Whether calls in the answer are to be parsed.
        num_choices: Number of completions, `n`.
        model: The name that the client gave to the model.
        is_streamed: Whether the answer is a stream of events.
        has_usage: Whether the stream ends with the numbers of tokens.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    calls_tools: bool = False
    num_choices: int = 1
    model: str = "policy"
    is_streamed: bool = False
    has_usage: bool = False


@dataclass(frozen=True)
class Choice:
    """Holds one completion.

    Attributes:
        message: The message of the role `assistant`, as the API returns it.
        truncated: Whether the completion ended at the limit of tokens.
        prompt_tokens, completion_tokens: Numbers of tokens; 0 if unknown.
    """

    message: dict[str, Any]
    truncated: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def finish_reason(self) -> str:
        if self.truncated:
            return "length"
        return "tool_calls" if self.message.get("tool_calls") else "stop"


def parse_request(body: bytes) -> ChatRequest:
    """Read the body of a request to `chat/completions`. Raises `RequestRefused`."""
    try:
        content = json.loads(body)
    except ValueError as error:
        raise RequestRefused(f"the body is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise RequestRefused("the body is not a JSON object")
    for name, values in _IGNORED_VALUES.items():
        if content.get(name) not in values:
            raise RequestRefused(f"{name}={json.dumps(content[name])} is not supported; {_ADVICE[name]}")
    messages = content.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestRefused("messages must be a list with at least one message")
    plain = [plain_message(message) for message in messages]
    if plain[-1]["role"] == "assistant":
        raise RequestRefused("the last message is of the role assistant; the API does not continue a begun answer")
    tools = content.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RequestRefused("tools must be a list of JSON schemas")
    number = content.get("n", 1)
    number = 1 if number is None else number
    if not isinstance(number, int) or not 1 <= number <= _MAX_CHOICES:
        raise RequestRefused(f"n must be a number from 1 to {_MAX_CHOICES}, got {json.dumps(number)}")
    return ChatRequest(
        plain,
        tools,
        calls_tools=bool(tools) and content.get("tool_choice") != "none",
        num_choices=number,
        model=str(content.get("model") or Model.name),
        is_streamed=bool(content.get("stream")),
        has_usage=bool((content.get("stream_options") or {}).get("include_usage")),
    )


def plain_message(message: Any) -> dict[str, Any]:
    """Return a message of a request in the form that chat templates expect. Raises `RequestRefused`."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestRefused(f"a message needs a role and a content, got {json.dumps(message)[:200]}")
    role = "system" if message["role"] == "developer" else message["role"]
    plain: dict[str, Any] = {"role": role, "content": _text(message.get("content"))}
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            plain[name] = str(message[name])
    if message.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in message["tool_calls"]]
    return plain


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise RequestRefused(f"a content must be text, got {json.dumps(content)[:200]}")


def _plain_call(call: Any) -> dict[str, Any]:
    try:
        function = call["function"]
        name, arguments = str(function["name"]), function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(arguments, dict):
            raise TypeError("the arguments are not a JSON object")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RequestRefused(f"a tool call cannot be read: {error!r}") from None
    plain = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": str(call["id"]), **plain} if call.get("id") else plain


def chat_response(request: ChatRequest, choices: list[Choice]) -> dict[str, Any]:
    prompt, completion = choices[0].prompt_tokens, sum(choice.completion_tokens for choice in choices)
    return {
        "id": f"chatcmpl-{secrets.token_hex(8)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [
            {"index": index, "message": choice.message, "finish_reason": choice.finish_reason, "logprobs": None}
            for index, choice in enumerate(choices)
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }


def chat_chunks(request: ChatRequest, response: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the events of a streamed answer: each message in one, then its end."""
    head = {**{name: response[name] for name in ("id", "created", "model")}, "object": "chat.completion.chunk"}
    chunks = []
    for choice in response["choices"]:
        index, delta = choice["index"], dict(choice["message"])
        if delta.get("tool_calls"):
            delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(delta["tool_calls"])]
        chunks.append({**head, "choices": [{"index": index, "delta": delta, "finish_reason": None}]})
        end = {"index": index, "delta": {}, "finish_reason": choice["finish_reason"]}
        chunks.append({**head, "choices": [end]})
    if request.has_usage:
        chunks.append({**head, "choices": [], "usage": response["usage"]})
    return chunks
