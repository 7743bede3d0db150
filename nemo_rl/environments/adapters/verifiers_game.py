"""The guessing game of `nemo_rl.environments.games`, written with the base classes of verifiers.

It is an example, and part of `grpo_many_environments.yaml`: its texts are those that the embedded chat model knows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import verifiers.v1 as vf

from nemo_rl.environments.games import GuessNumber

__all__ = ["GuessNumberEnv", "GuessNumberTaskset"]


class GuessNumberConfig(vf.TasksetConfig):
    """Configures the taskset."""

    highest: int = 20


class GuessNumberData(vf.TaskData):
    """Holds one game."""

    highest: int
    seed: int


class GuessNumberTask(vf.Task[GuessNumberData, vf.State, vf.TaskConfig]):
    """One game. The environment scores it."""


class GuessNumberTaskset(vf.Taskset[GuessNumberTask, GuessNumberConfig]):
    """Endless games."""

    INFINITE = True

    def load(self) -> Iterator[GuessNumberTask]:
        """Yield a game for each seed."""
        highest = self.config.highest
        for seed in itertools.count():
            prompt = str(GuessNumber(highest).reset({"seed": seed}))
            data = GuessNumberData(prompt=prompt, highest=highest, seed=seed)
            yield GuessNumberTask(data, self.config.task)


class GuessNumberEnvConfig(vf.EnvConfig):
    """Configures the environment."""

    player: vf.AgentConfig = vf.AgentConfig()


class GuessNumberEnv(vf.Env[GuessNumberEnvConfig]):
    """Answers the guesses of the player. The reward is 1 for the right number in time."""

    async def run(self, task: GuessNumberTask, agents: vf.Agents) -> None:
        """Play one game."""
        game = GuessNumber(task.data.highest)
        game.reset({"seed": task.data.seed})
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn()
            turn = game.step(segment.last_reply)
            while not turn.done:  # without a reply, such as after an error, the game is lost
                segment = await interaction.turn(turn.observation)
                turn = game.step(segment.last_reply)
        interaction.trace.record_reward("won", turn.reward)
        interaction.trace.record_metric("guesses", turn.info.get("guesses", 0))
