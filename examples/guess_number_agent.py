"""An agent that is trained: a program that plays a game by requests to the model, with the `openai` package.

    uv run examples/run_grpo_math.py --config examples/configs/grpo_agent.yaml

Nothing in `run` is about training. The same program could play with any model behind an OpenAI-compatible API.
"""

from __future__ import annotations

import functools
from typing import Any

import openai

from nemo_rl.environments.agent import Agent, Model
from nemo_rl.environments.episode import Turn
from nemo_rl.environments.games import GuessNumber


@functools.cache
def connections() -> openai.DefaultHttpxClient:
    """Return the connections of all episodes of a worker. Each client of its own would take 50 ms to make."""
    return openai.DefaultHttpxClient()


class GuessNumberAgent(Agent):
    """Lets the model guess a number. The reward is 1 if it finds the number in time."""

    def run(self, problem: dict[str, Any], model: Model) -> Turn:
        """Play one game."""
        game = GuessNumber()
        messages: list[Any] = [{"role": "user", "content": game.reset(problem)}]
        client = openai.OpenAI(base_url=model.base_url, api_key=model.api_key, http_client=connections())
        while True:
            reply = client.chat.completions.create(model=model.name, messages=messages)
            guess = reply.choices[0].message.content or ""
            turn = game.step(guess)
            if turn.done:
                return turn
            messages.append({"role": "assistant", "content": guess})
            messages.append({"role": "user", "content": turn.observation})
