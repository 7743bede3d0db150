"""Adapters of other libraries, each in a venv with only that library."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.environments.episode_calls import Request
from nemo_rl.environments.episode_process import EpisodeProcess


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Callable[..., dict[str, Any]]]]:
    """Return a function that starts an environment, and returns a function that calls its episodes."""
    processes: list[EpisodeProcess] = []

    def make(requirement: str, name: str, config: dict[str, Any]) -> Callable[..., dict[str, Any]]:
        python = tmp_path / "venv" / "bin" / "python"
        if not python.exists():
            subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
            subprocess.run(["uv", "pip", "install", "--quiet", "--python", python, requirement], check=True)
        process = EpisodeProcess(str(python), name, config)
        processes.append(process)

        def call(episode: int, method: Any, argument: Any) -> dict[str, Any]:
            process.submit([Request(episode, method, argument)])
            replies = []
            while not replies:
                replies = process.collect(timeout_s=60)
            [reply] = replies
            assert reply.failure is None, reply.details
            assert reply.value is not None
            return reply.value

        return call

    yield make
    for process in processes:
        process.shutdown()


@pytest.mark.slow  # builds a venv
def test_reasoning_gym(start) -> None:
    name = "nemo_rl.environments.adapters.reasoning_gym.ReasoningGym"
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    call = start("reasoning-gym==0.1.25", name, {"dataset": "chain_sum", "options": options})
    questions = [call(episode, "reset", {"seed": episode})["messages"][0]["content"] for episode in range(4)]
    assert len(set(questions)) > 1
    assert call(9, "reset", {"seed": 2})["messages"][0]["content"] == questions[2]
    assert questions[0].endswith("Write the final answer as <answer>...</answer>.")
    terms = re.search(r"(\d+) ([+-]) (\d+)", questions[0])
    assert terms is not None
    total = int(terms[1]) + int(terms[3]) * (1 if terms[2] == "+" else -1)
    right = call(0, "step", f"I add them. <answer>{total}</answer>")
    assert (right["reward"], right["done"], right["info"]["solved"]) == (1.0, True, 1.0)
    wrong = call(1, "step", "no tag")
    assert wrong["reward"] < 1.0
    assert wrong["info"] == {"answered": 0.0, "solved": 0.0}


@pytest.mark.slow  # builds a venv
def test_textarena(start) -> None:
    name = "nemo_rl.environments.adapters.textarena.TextArena"
    call = start("textarena==0.7.4", name, {"game": "GuessTheNumber-v0"})

    def play(episode: int, seed: int) -> list[str]:
        """Guess by halves; returns what the game says."""
        said = [call(episode, "reset", {"seed": seed})["messages"][0]["content"]]
        low, high = 1, 20
        while True:
            guess = (low + high) // 2
            turn = call(episode, "step", f"[{guess}]")
            if turn["done"]:
                assert turn["reward"] == 1.0
                assert turn["info"] == {"won": 1.0}
                return said
            said.append(turn["messages"][0]["content"])
            low, high = (guess + 1, high) if "higher" in said[-1] else (low, guess - 1)

    games = [play(seed, seed) for seed in range(4)]
    assert "between 1 and 20" in games[0][0]
    assert len({len(game) for game in games}) > 1
    assert play(10, 3) == games[3]
