"""Environments of `openenv`, in this process or on a server.

Tested with openenv 0.10.0. An environment of openenv has typed actions and observations; the model reads and writes
text. It needs no data set: use `data: {train: {kind: seeds}}`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openenv.core.env_server.interfaces as openenv_interfaces
from openenv.core.client_types import StepResult
from openenv.core.env_server.mcp_types import CallToolAction, ListToolsAction
from openenv.core.env_server.serialization import deserialize_action
from openenv.core.env_server.types import Action, WSErrorCode
from openenv.core.generic_client import GenericEnvClient
from pydantic import ValidationError

from nemo_rl.distributed.workers.host import load_object
from nemo_rl.environments.episode import Environment, Turn
from nemo_rl.environments.tools.registry import load_call_format
from nemo_rl.environments.tools.tool_calls import ToolCall

_END_OF_THINKING = "</think>"  # what a model writes before it is no part of the action
_MAX_SEED = 2**32  # of numpy, which many environments use
_SERVER_REFUSES = f"(code: {WSErrorCode.VALIDATION_ERROR.value})"


class OpenEnv(Environment):
    """One episode of an environment of openenv.

    What the model writes before `</think>` is no part of the action. An action that is not valid costs a turn, and the
    model reads why. After `max_invalid_actions` of them the episode ends, with the rewards so far. The metric is
    `invalid_actions`.

    With `call_format`, an action is one or more calls of the tools of an `MCPEnvironment`. The chat template shows the
    tools to the model.

    Args:
        environment: `package.module.Class` of the environment, which then runs in this process. Each episode has an
            object of its own.
        url: Address of a running server instead, such as "http://localhost:8000".
        options: Keyword arguments of the class, or of the connection to the server (`headers`, `message_timeout_s`).
        action: `package.module.Class` of the actions. None: what the type hint of the environment's `step` names; on a
            server, the server checks actions.
        action_field: Field of the action that takes the text. None: its only field. If there are several, or if the
            class is unknown, the text is a JSON object of them.
        observation: What the model reads, with fields of the observation in braces, such as "{board} Lives: {lives}".
            None: its only field. If there are several, a JSON object of them.
        instruction: Text before the first observation.
        reset: Further keyword arguments of the environment's `reset`. It always receives the problem's seed if it has
            the parameter `seed`.
        problem_fields: Fields of the problem that `reset` receives, too.
        call_format: How the model writes calls, see `tools.tool_calls`; None for an environment without tools.
        max_invalid_actions: How many actions of an episode may be invalid.

    Raises:
        ValueError: Neither or both of `environment` and `url` are given; the class of actions is unknown; or objects of
            the environment cannot exist at the same time.
    """

    def __init__(
        self,
        environment: str | None = None,
        *,
        url: str | None = None,
        options: Mapping[str, Any] | None = None,
        action: str | None = None,
        action_field: str | None = None,
        observation: str | None = None,
        instruction: str = "",
        reset: Mapping[str, Any] | None = None,
        problem_fields: Sequence[str] = (),
        call_format: str | None = None,
        max_invalid_actions: int = 3,
    ) -> None:
        if (environment is None) == (url is None):
            raise ValueError("set either `environment`, the class of an openenv environment, or `url`, its server")
        self._action = None if action is None else load_object(action)
        if environment is not None:
            if self._action is None and call_format is None:
                self._action = _action_class(environment)
            self._session: _InProcess | _OnServer = _InProcess(environment, options or {})
        else:
            assert url is not None
            self._session = _OnServer(url, options or {})
        self._action_field = action_field or _only_field(self._action)
        self._observation, self._instruction = observation, instruction
        self._reset, self._problem_fields = reset or {}, problem_fields
        self._parse_calls = None if call_format is None else load_call_format(call_format)
        self._tools: list[dict[str, Any]] = []
        self._max_invalid, self._num_invalid = max_invalid_actions, 0

    async def reset(self, problem: dict[str, Any]) -> str:  # type: ignore[override]
        fields = {name: problem[name] for name in self._problem_fields}
        result = await self._session.reset(seed=problem["seed"] % _MAX_SEED, **self._reset, **fields)
        if self._parse_calls is not None:
            listing = await self._session.step(ListToolsAction())
            self._tools = [_tool_schema(tool) for tool in listing.observation["tools"]]
        text = self._text(result.observation)
        return f"{self._instruction}\n{text}" if self._instruction and text else self._instruction or text

    async def step(self, action: str) -> Turn:  # type: ignore[override]
        text = action.rpartition(_END_OF_THINKING)[2].strip()
        try:
            if self._parse_calls is not None:
                return await self._call_tools(self._parse_calls(text))
            result = await self._session.step(self._parsed(text))
        except _InvalidActionError as error:
            self._num_invalid += 1
            ends = self._num_invalid >= self._max_invalid
            return Turn(0.0, f"Invalid action: {error}", done=ends, info=self._info())
        return Turn(float(result.reward or 0.0), self._text(result.observation), done=result.done, info=self._info())

    def tools(self) -> list[dict[str, Any]]:
        return self._tools

    async def close(self) -> None:  # type: ignore[override]
        await self._session.close()

    async def _call_tools(self, calls: Sequence[ToolCall]) -> Turn:
        """Run calls until one of them ends the episode. Raises `_InvalidActionError`."""
        problems = [call.problem for call in calls if call.problem]
        if not calls or problems:
            raise _InvalidActionError(problems[0] if problems else "it calls no tool")
        reward, messages = 0.0, []
        for call in calls:
            result = await self._session.step(CallToolAction(tool_name=call.name, arguments=call.arguments))
            reward += float(result.reward or 0.0)
            messages.append({"role": "tool", "content": _tool_text(result.observation), "name": call.name})
            if result.done:
                break
        return Turn(reward, messages, done=result.done, info=self._info())

    def _info(self) -> dict[str, float]:
        return {"invalid_actions": float(self._num_invalid)}

    def _parsed(self, text: str) -> Action | dict[str, Any]:
        """Return the action that a text stands for. Raises `_InvalidActionError`."""
        fields: Any = {self._action_field: text}
        if self._action_field is None:
            try:
                fields = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise _InvalidActionError(f"it is not JSON: {error}") from None
            if not isinstance(fields, dict):
                raise _InvalidActionError("it is not a JSON object")
        if self._action is None:
            return fields
        try:
            return deserialize_action(fields, self._action)
        except ValidationError as error:
            reasons = (f"{'.'.join(map(str, reason['loc']))}: {reason['msg']}" for reason in error.errors())
            raise _InvalidActionError("; ".join(reasons)) from None

    def _text(self, fields: Mapping[str, Any]) -> str:
        if self._observation is not None:
            return self._observation.format_map({name: _shown(value) for name, value in fields.items()})
        # Metadata may contain the solution.
        fields = {name: value for name, value in fields.items() if name != "metadata"}
        if len(fields) == 1:
            [value] = fields.values()
            return _shown(value)
        return _shown(fields)


class _InvalidActionError(Exception):
    """The model's text is not an action of the environment."""


class _InProcess:
    """Calls an environment in this process, like openenv's server: its coroutines, or else in a thread of its own."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._class = _environment_class(name)
        self._options = options
        self._thread = ThreadPoolExecutor(1, f"openenv: {name}")
        self._environment: openenv_interfaces.Environment | None = None

    async def reset(self, **arguments: Any) -> StepResult[dict[str, Any]]:
        self._environment = await self._in_thread(self._class, **self._options)
        accepted = inspect.signature(self._implementation("reset")).parameters
        if "seed" not in accepted and not any(each.kind is each.VAR_KEYWORD for each in accepted.values()):
            del arguments["seed"]
        return await self._call("reset", **arguments)

    async def step(self, action: Any) -> StepResult[dict[str, Any]]:
        return await self._call("step", action)

    async def close(self) -> None:
        if self._environment is not None:
            await self._in_thread(self._environment.close)
        self._thread.shutdown(wait=False)

    def _implementation(self, method: str) -> Callable[..., Any]:
        """Return the coroutine if the class has one, else the function, as openenv's server does."""
        name = f"{method}_async"
        has_coroutine = getattr(self._class, name) is not getattr(openenv_interfaces.Environment, name)
        return getattr(self._environment, name if has_coroutine else method)

    async def _call(self, method: str, *arguments: Any, **keywords: Any) -> StepResult[dict[str, Any]]:
        function = self._implementation(method)
        if inspect.iscoroutinefunction(function):
            observation = await function(*arguments, **keywords)
        else:
            observation = await self._in_thread(function, *arguments, **keywords)
        fields = observation.model_dump(mode="json", exclude={"reward", "done"})
        return StepResult(fields, observation.reward, observation.done)

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        call = functools.partial(function, *arguments, **keywords)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


class _OnServer:
    """Calls an environment through the client of openenv; each episode has a connection of its own."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self._client = GenericEnvClient(base_url=url, **options)

    async def reset(self, **arguments: Any) -> StepResult[dict[str, Any]]:
        return await self._client.reset(**arguments)

    async def step(self, action: Any) -> StepResult[dict[str, Any]]:
        try:
            return await self._client.step(action)
        except RuntimeError as error:
            if _SERVER_REFUSES in str(error):
                raise _InvalidActionError("the environment does not accept its fields") from error
            raise

    async def close(self) -> None:
        await self._client.close()


def _environment_class(name: str) -> Any:
    target: Any = load_object(name)
    is_environment = isinstance(target, type) and issubclass(target, openenv_interfaces.Environment)
    if not is_environment:
        raise ValueError(f"{name} is not a class that derives from openenv's Environment")
    if not target.SUPPORTS_CONCURRENT_SESSIONS:
        raise ValueError(
            f"{name}.SUPPORTS_CONCURRENT_SESSIONS is False, but many episodes are open at the same time; if its "
            "objects share nothing, set it to True in a subclass, and name that as `environment`"
        )
    return target


def _action_class(name: str) -> type[Action]:
    """Return the class of actions that the type hint of the environment's `step` names."""
    try:
        hint = typing.get_type_hints(_environment_class(name).step).get("action")
    except NameError:
        hint = None
    if not isinstance(hint, type) or not issubclass(hint, Action):
        raise ValueError(f"the type hint of {name}.step does not name the class of its actions; set it as `action`")
    return hint


def _only_field(action: type[Action] | None) -> str | None:
    names = [] if action is None else [name for name in action.model_fields if name != "metadata"]
    return names[0] if len(names) == 1 else None


def _tool_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": tool["name"], "description": tool["description"], "parameters": tool["input_schema"]}
    return {"type": "function", "function": function}


def _tool_text(observation: Mapping[str, Any]) -> str:
    """Return the text of a `CallToolObservation`."""
    if observation["error"] is not None:
        return f"Error: {observation['error']['message']}"
    result = observation["result"]
    if isinstance(result, dict) and isinstance(result.get("content"), list):
        return "\n".join(_shown(part.get("text", part)) for part in result["content"])
    return _shown(result)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
