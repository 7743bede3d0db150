"""Agents: code that drives the model by itself, as an environment.

An agent is written against an OpenAI-compatible API: with the `openai` package, with an agent framework, or by hand. It
knows nothing of training. Its requests become the turns of an episode (`agent_episode`)::

    agent ──POST chat/completions──► endpoint on loopback ──messages──► training loop ──► generation
          ◄────── completion ───────                      ◄──action───

The training loop samples, with its own settings, and keeps tokens, log-probabilities and the version of the weights of
every action. Like `episode`, the module needs nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_rl.environments.episode import Message, Turn


@dataclass(frozen=True)
class Model:
    """Says how an agent reaches the model.

    Attributes:
        base_url: Address of the API, "http://127.0.0.1:PORT/v1". Only processes of this machine can reach it.
        api_key: Key of the episode. A request with it belongs to the episode; it is invalid when the episode has ended.
        name: Name of the model. The API accepts any other name, too.
    """

    base_url: str
    api_key: str = field(repr=False)
    name: str = "policy"


class Agent:
    """Solves a problem by requests to the model. One object per episode.

    The worker makes the object with the keyword arguments of `env.<name>.config`. An exception is a failure of the
    environment, never a reward.

    The API has `chat/completions` (with `tools`, `n` and `stream`) and `models`. Sampling parameters are accepted and
    ignored: the training job decides them, as it trains on what it samples. What cannot be ignored, such as `stop` or
    `response_format`, is refused with the status 400.

    Requests of one episode are answered one at a time. A request whose messages continue an earlier conversation of the
    episode, unchanged, continues its tokens; any other one begins a transcript of its own, a branch. All branches are
    trained on, with the advantage of the episode.

    Example:

        class Solver(Agent):
            def run(self, problem, model):
                client = openai.OpenAI(base_url=model.base_url, api_key=model.api_key)
                messages = [{"role": "user", "content": problem["prompt"]}]
                reply = client.chat.completions.create(model=model.name, messages=messages)
                return float(reply.choices[0].message.content.strip() == problem["answer"])

    Attributes:
        call_format: How the model writes calls of tools. See `tools.tool_calls`; or `package.module.function` of a
            function `parse(text) -> list[ToolCall]`.
    """

    call_format = "hermes"

    def run(self, problem: dict[str, Any], model: Model) -> float | Turn:
        """Solve the problem. May be a coroutine (`async def`).

        Args:
            problem: See `episode.Environment.reset`.
            model: Address and key of the API.

        Returns:
            The reward of the episode; or a `Turn`, for `info` and `truncated`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ModelCall:
    """Holds one request of an agent, as an observation.

    Attributes:
        messages: What the model reads in addition to the conversation that the request continues; without such a one,
            the whole conversation.
        tools: JSON schemas of the tools that the model sees, of a new conversation.
        continues: The action of the episode, counted from 0, whose conversation the request continues. None: it begins
            a new conversation.
    """

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] = ()
    continues: int | None = None
