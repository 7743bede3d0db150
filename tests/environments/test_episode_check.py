"""The check of an environment, in this process: each wrong environment gets its sentence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.environments.episode_check import CheckReport, check_environment, random_action
from nemo_rl.environments.episode_host import EpisodeHost

sys.path.append(str(Path(__file__).parent.parent / "cli"))

PROBLEMS = [{"seed": seed, "prompt": "2 + 2", "answer": "4"} for seed in range(3)]


def check(name: str, max_turns: int = 8, **options: Any) -> CheckReport:
    host = EpisodeHost(f"env_games.{name}", {})
    try:
        return check_environment(host, PROBLEMS, max_turns=max_turns, **options)
    finally:
        host.shutdown()


def test_right_environment_has_no_findings() -> None:
    report = check("Guess", policy=lambda problem, messages, turn: str(turn))
    assert (report.errors, report.warnings) == ([], [])
    assert {episode.end for episode in report.episodes} == {"done"}
    # The number of seed 0 is 6, beyond the 5 guesses; those of seeds 1 and 2 are 2 and 0.
    assert [episode.reward for episode in report.episodes] == [0.0, 1.0, 1.0]
    assert [len(episode.step_s) for episode in report.episodes] == [5, 3, 1]


def test_scoring_function_is_played_on_the_prompt() -> None:
    report = check("same", policy=lambda problem, messages, turn: problem["answer"])
    assert report.errors == []
    assert [(e.messages[0]["content"], e.reward) for e in report.episodes] == [("2 + 2", 1.0)] * 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Unseeded", "problems 0, 1, 2: two episodes of the same problem begin with different observations: 'Game 0:"),
        ("NotANumber", "problems 0, 1, 2: env_games.NotANumber.step raised ValueError: the reward is nan"),
        ("NotText", "problems 0, 1, 2: an observation has the content 5; return text"),
        ("Endless", "no episode ended within max_turns=8 actions; return Turn(done=True) at the end, or raise"),
    ],
)
def test_wrong_environment_is_an_error(name: str, expected: str) -> None:
    (error,) = check(name).errors
    assert error.startswith(expected)


def test_exception_names_line_and_action() -> None:
    (error,) = check("Strict", policy=lambda problem, messages, turn: "seven").errors
    assert "env_games.Strict.step raised ValueError: invalid literal for int() with base 10: 'seven' (" in error
    assert "/tests/cli/env_games.py:" in error
    assert error.endswith("for the action 'seven'; an action is any text, so return a Turn for each")


def test_slow_step_is_an_error() -> None:
    (error,) = check("Slow", timeout_s=0.2, policy=lambda problem, messages, turn: "7").errors
    assert error == "step took more than 0.2 s for the action '7'; raise step_timeout_s if it may take that long"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("UnseededTurns", "differ after turn 1"), ("SameForAll", "all 3 problems begin with the same observation")],
)
def test_unusual_environment_is_a_warning(name: str, expected: str) -> None:
    report = check(name)
    assert report.errors == []
    (warning,) = report.warnings
    assert expected in warning


def test_random_actions_follow_from_the_seed() -> None:
    messages = [{"role": "user", "content": "Choose north or south."}]
    actions = [random_action({"seed": 3, "answer": "x"}, messages, turn) for turn in range(50)]
    assert actions == [random_action({"seed": 3, "answer": "x"}, messages, turn) for turn in range(50)]
    assert {"", "x", "north"} <= set(actions)
