"""Turns an agent, which calls the model, into an environment, which is called with the actions of the model.

::

    EpisodeHost ──reset(problem)──► AgentEpisode ──starts──► Agent.run, in a thread
                ◄──ModelCall───────      ▲ │ ◄────request── endpoint ◄── agent
                ──step(action)────►      │ └─────answer───► endpoint ──► agent
                ◄──ModelCall, or the reward of `run`

Requests are answered one at a time, in the order of their arrival. The history of every action is known by a digest, so
a request finds the action that its messages continue.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import inspect
import json
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from nemo_rl.environments.agent import Agent, Model, ModelCall
from nemo_rl.environments.agent_endpoint import AgentEndpoint
from nemo_rl.environments.agent_requests import ChatRequest, Choice, RequestRefused, plain_message
from nemo_rl.environments.episode import Environment, Message, Turn
from nemo_rl.environments.tools.registry import load_call_format
from nemo_rl.environments.tools.tool_calls import ToolCall

_ENDED = "the episode has ended"


@dataclass(frozen=True)
class _Pending:
    """A completion that an agent waits for."""

    request: ChatRequest
    answer: Future[Choice]


class AgentEpisode(Environment):
    """One episode of an agent.

    Args:
        agent: The agent.
        endpoint: The endpoint of this process.

    Raises:
        ConfigError: The agent's `call_format` is unknown.
    """

    def __init__(self, agent: Agent, endpoint: AgentEndpoint) -> None:
        self._agent, self._endpoint = agent, endpoint
        self._parse = load_call_format(agent.call_format)
        # What the agent's threads send: completions to sample, then the end of the run.
        self._events: queue.SimpleQueue[_Pending | Turn | Exception] = queue.SimpleQueue()
        self._pending: _Pending | None = None
        self._actions: dict[str, int] = {}  # digest of a conversation up to an action -> number of the action
        self._num_actions = 0
        self._ended = threading.Event()
        self._model: Model | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def reset(self, problem: dict[str, Any]) -> ModelCall:  # type: ignore[override]
        """Start the agent, and return its first request. Raises what the agent raises."""
        self._model = self._endpoint.open_session(self._complete)
        threading.Thread(target=self._run, args=[problem, self._model], name="agent", daemon=True).start()
        event = self._next_event()
        if isinstance(event, Turn):
            raise RuntimeError("it ended without a request to the model")
        return event

    def step(self, action: str, usage: Mapping[str, Any] | None = None) -> Turn:
        """Answer the agent's request, and return its next one, or its reward. Raises what the agent raises.

        Args:
            action: The text that the model sampled.
            usage: See `episode_calls.Request.usage`.
        """
        assert self._pending is not None
        request, answer = self._pending.request, self._pending.answer
        self._pending = None
        calls = self._parse(_answer_text(action)) if request.calls_tools else []
        message = assistant_message(action, calls, self._num_actions)
        history = [*request.messages, plain_message(message)]
        self._actions[_digests(request.tools, history)[-1]] = self._num_actions
        self._num_actions += 1
        answer.set_result(Choice(message, **(usage or {})))
        event = self._next_event()
        return event if isinstance(event, Turn) else Turn(observation=event)  # type: ignore[arg-type]

    def close(self) -> None:
        """End the session. Later requests of the agent fail; a coroutine is cancelled."""
        self._ended.set()
        if self._model is not None:
            self._endpoint.close_session(self._model)
        self._refuse(self._pending)
        while not self._events.empty():
            self._refuse(self._events.get())
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(_cancel_all, self._loop)

    def _next_event(self) -> ModelCall | Turn:
        event = self._events.get()
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Turn):
            return event
        self._pending = event
        return self._model_call(event.request)

    def _model_call(self, request: ChatRequest) -> ModelCall:
        """Return the request as what follows the longest conversation that it continues."""
        digests = _digests(request.tools, request.messages)
        for length in range(len(digests) - 1, 0, -1):
            if request.messages[length]["role"] == "assistant":
                break  # only sampled tokens can be continued, and these messages were not sampled here
            number = self._actions.get(digests[length - 1])
            if number is not None:
                return ModelCall(request.messages[length:], continues=number)
        return ModelCall(request.messages, request.tools)

    # --- in the threads of the agent and of its requests --------------------------------------------------------------

    def _run(self, problem: dict[str, Any], model: Model) -> None:
        try:
            result = self._agent.run(problem, model)
            if inspect.isawaitable(result):
                result = self._run_coroutine(result)
            event: Any = result if isinstance(result, Turn) else Turn(reward=result)
            self._events.put(Turn(event.reward, None, not event.truncated, event.truncated, event.info))
        except Exception as error:
            self._events.put(error)
        except BaseException as error:  # SystemExit, or the cancellation of a coroutine
            self._events.put(RuntimeError(f"it ended with {error!r}"))

    def _run_coroutine(self, result: Any) -> Any:
        async def wait() -> Any:
            self._loop = asyncio.get_running_loop()
            return await result

        return asyncio.run(wait())

    def _complete(self, request: ChatRequest) -> list[Choice]:
        """Wait for the completions of a request. Runs in a thread of the endpoint."""
        pending = [_Pending(request, Future()) for _ in range(request.num_choices)]
        for item in pending:
            self._events.put(item)
        if self._ended.is_set():  # `close` may not have seen them
            raise RequestRefused(_ENDED)
        return [item.answer.result() for item in pending]

    def _refuse(self, event: object) -> None:
        if isinstance(event, _Pending) and not event.answer.done():
            event.answer.set_exception(RequestRefused(_ENDED))


def assistant_message(text: str, calls: Sequence[ToolCall], number: int) -> dict[str, Any]:
    """Return the message of an action as the API returns it.

    Args:
        text: What the model wrote.
        calls: The calls in it. If one of them cannot be read, the message is plain text.
        number: The number of the action, from which calls without an id get one.
    """
    if not calls or any(call.problem for call in calls):
        return {"role": "assistant", "content": text}
    content = text.partition("<tool_call>")[0].strip() if "<tool_call>" in text else ""
    return {
        "role": "assistant",
        "content": content or None,
        "tool_calls": [
            {
                # Nine letters and digits: some templates accept no other ids.
                "id": call.id or f"call{number:03d}{index:02d}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for index, call in enumerate(calls)
        ],
    }


def _answer_text(action: str) -> str:
    """Return what follows the thinking of an action."""
    return action.rpartition("</think>")[2].strip()


def _digests(tools: Sequence[Mapping[str, Any]], messages: Sequence[Message]) -> list[str]:
    """Return the digest of each beginning of a conversation: of its first message, of the first two, and so on."""
    digest = hashlib.sha256(json.dumps(tools, sort_keys=True).encode())
    digests = []
    for message in messages:
        if message["role"] == "assistant":  # clients remove white space
            message = {**message, "content": message["content"].strip()}
        digest.update(b"\0" + json.dumps(message, sort_keys=True).encode())
        digests.append(digest.copy().hexdigest())
    return digests


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()
