"""An environment in which a model calls tools until it writes a final answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_rl.distributed.workers.host import load_object
from nemo_rl.environments.episode import Environment, Message, Observation, Turn
from nemo_rl.environments.tools.coroutines import completed
from nemo_rl.environments.tools.registry import load_call_format, load_tool
from nemo_rl.environments.tools.tool_set import Toolbox, ToolSet, abbreviated, as_options, tools_of
from nemo_rl.errors import ConfigError

ToolSource = str | Mapping[str, Any] | Callable[..., Any] | ToolSet
_END_OF_THINKING = "</think>"


class ToolEnvironment(Environment):
    """Runs the tool calls of each action. An action without a call is the final answer, which is scored.

    Use it as it is, with `tools` and `score` from the configuration, or derive a class that overrides `score` and has
    tools of its own. What a model writes before `</think>` is neither searched for calls nor scored.

    The metrics are `tool_calls` and `tool_errors`, per episode. An error is a call that the model got wrong: it reads
    the reason and can try again.

    Example:
        >>> class Shop(ToolEnvironment):
        ...     def __init__(self):
        ...         super().__init__([self.price])
        ...
        ...     def price(self, item: str) -> float:
        ...         '''Return the price of an item.'''
        ...         return {"tea": 3.5, "cake": 4.0}[item]
        ...
        ...     def score(self, text, problem):
        ...         return float(text == problem["answer"])
        >>> episode = Shop()
        >>> episode.reset({"prompt": "What does tea cost?", "answer": "3.5", "seed": 0})
        >>> episode.step('<tool_call>{"name": "price", "arguments": {"item": "tea"}}</tool_call>').observation
        [{'role': 'tool', 'content': '3.5', 'name': 'price'}]
        >>> episode.step("3.5").reward
        1.0

    Args:
        tools: Names of built-in tools or of `package.module.name`, where a mapping `{name: ..., option: value}` passes
            arguments to a class; functions, methods, and objects of `ToolSet`.
        score: `package.module.function` of a scoring function `score(completion, answer) -> float`, unless `score` is
            overridden.
        call_format: Name of the format of calls, or `package.module.function` of `parse(text) -> list[ToolCall]`.
        max_output_chars: Longer results of a tool are shortened in the middle.
        max_calls_per_turn: Further calls of an action are not run.

    Raises:
        ConfigError: A tool, the call format or the scoring function does not exist or cannot be used.
    """

    def __init__(
        self,
        tools: Sequence[ToolSource] = (),
        *,
        score: str | None = None,
        call_format: str = "hermes",
        max_output_chars: int = 4000,
        max_calls_per_turn: int = 16,
    ) -> None:
        self.problem: dict[str, Any] = {}
        self._parse = load_call_format(call_format)
        self._score = _scoring_function(self, score)
        self._max_output_chars, self._max_calls_per_turn = max_output_chars, max_calls_per_turn
        self._sources = [_tool_source(tool) for tool in tools]
        self._toolbox = Toolbox([])
        self._counts = {"tool_calls": 0, "tool_errors": 0}

    def reset(self, problem: dict[str, Any]) -> Observation | None:
        """Begin the episode with the problem's prompt. A class that overrides this calls it first."""
        self.problem = problem
        for source in self._sources:
            if isinstance(source, ToolSet):
                source.reset(problem)
        self._toolbox = Toolbox([tool for source in self._sources for tool in tools_of(source)], self._max_output_chars)
        return None

    def tools(self) -> list[dict[str, Any]]:
        """Return the JSON schemas of the tools."""
        return self._toolbox.schemas()

    def step(self, action: str) -> Turn:
        """Run the calls of an action, or score it if it has none."""
        text = action.rpartition(_END_OF_THINKING)[2].strip()
        calls = self._parse(text)
        if not calls:
            reward = float(completed(self.score(text, self.problem)))
            return Turn(reward=reward, done=True, info=dict(self._counts), answer=text or None)
        messages: list[Message] = []
        for number, call in enumerate(calls):
            if number < self._max_calls_per_turn:
                content, succeeded = self._toolbox.run(call)
            else:
                content = f"Error: not run, because a message may contain at most {self._max_calls_per_turn} calls"
                succeeded = False
            self._counts["tool_calls"] += 1
            self._counts["tool_errors"] += not succeeded
            message: Message = {"role": "tool", "content": content}
            if call.name:
                message["name"] = abbreviated(call.name)
            if call.id:
                message["tool_call_id"] = abbreviated(call.id)
            messages.append(message)
        return Turn(observation=messages, info=dict(self._counts))

    def score(self, text: str, problem: dict[str, Any]) -> float:
        """Return the reward of a final answer.

        Args:
            text: The action, without white space around it and without what precedes `</think>`.
            problem: What `reset` received.
        """
        assert self._score is not None
        return float(completed(self._score(text, problem.get("answer"))))

    def close(self) -> None:
        """Close the tools."""
        with contextlib.ExitStack() as stack:
            for source in self._sources:
                if isinstance(source, ToolSet):
                    stack.callback(source.close)


def _tool_source(tool: ToolSource) -> Any:
    """Return the function or `ToolSet` that an entry of `tools` names."""
    if not isinstance(tool, str | Mapping):
        return tool
    try:
        name, options = as_options(tool)
    except TypeError as error:
        raise ConfigError(str(error)) from None
    source = load_tool(name)
    if not isinstance(source, type):
        if options:
            raise ConfigError(f"the tool {name!r} is a function and takes no options, but {sorted(options)} are given")
        return source
    if not issubclass(source, ToolSet):
        raise ConfigError(f"the tool {name!r} is a class that does not derive from ToolSet")
    try:
        return source(**options)
    except TypeError as error:
        raise ConfigError(f"the tool {name!r} does not accept the options {sorted(options)}: {error}") from error


def _scoring_function(environment: ToolEnvironment, name: str | None) -> Callable[..., Any] | None:
    """Return the configured scoring function; None if the class overrides `score`."""
    overridden = type(environment).score is not ToolEnvironment.score
    if name is None:
        if overridden:
            return None
        raise ConfigError(
            f"{type(environment).__name__} has no scoring function: set `score` to the `package.module.function` of a "
            "function score(completion, answer) -> float, or override the method `score`"
        )
    if overridden:
        raise ConfigError(f"{type(environment).__name__} overrides the method `score`, so {name!r} would not be used")
    try:
        score = load_object(name)
    except ImportError as error:
        raise ConfigError(f"the scoring function {name!r} cannot be imported: {error}") from error
    if not callable(score):
        raise ConfigError(f"the scoring function {name!r} is a {type(score).__name__}, not a function")
    return score
