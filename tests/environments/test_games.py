"""The environments that the embedded chat model learns: their rules, from the seed to the reward."""

from __future__ import annotations

from collections import Counter

import pytest

from nemo_rl.environments.episode import Turn
from nemo_rl.environments.episode_host import EpisodeHost, Request
from nemo_rl.environments.games import GuessNumber, Multiplication

CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "%s"}}</tool_call>'


def play(seed: int, highest: int, *, listens: bool) -> Turn:
    """Play a game by halving the range, which a player that does not listen keeps as it was."""
    game = GuessNumber(highest)
    game.reset({"seed": seed})
    low, high = 1, highest
    for number in range(1, 100):
        guess = (low + high) // 2 if listens else number
        turn = game.step(str(guess))
        if turn.done:
            return turn
        low, high = (guess + 1, high) if turn.observation == "Higher." else (low, guess - 1)
    raise AssertionError("the game does not end")


@pytest.mark.parametrize("highest", [1, 2, 15, 16, 20])
def test_halving_always_wins(highest: int) -> None:
    turns = [play(seed, highest, listens=True) for seed in range(100)]
    assert {turn.reward for turn in turns} == {1.0}
    assert {turn.info["won"] for turn in turns} == {1.0}
    assert max(turn.info["guesses"] for turn in turns) <= highest.bit_length()


def test_player_who_does_not_listen_wins_three_games_in_ten() -> None:
    rewards = [play(seed, 20, listens=False).reward for seed in range(2000)]
    assert 0.25 < sum(rewards) / len(rewards) < 0.35


def test_seeds_decide_the_number_evenly() -> None:
    def number(seed: int) -> int:
        wins = [guess for guess in range(1, 6) if step_once(seed, guess).reward]
        return wins[0] if wins else 0

    def step_once(seed: int, guess: int) -> Turn:
        game = GuessNumber(5)
        game.reset({"seed": seed})
        return game.step(str(guess))

    numbers = [number(seed) for seed in range(500)]
    assert numbers == [number(seed) for seed in range(500)]
    assert set(numbers) == {1, 2, 3, 4, 5}
    assert min(Counter(numbers).values()) > 60


@pytest.mark.parametrize("action", ["", "ten", "10 or 11", "-3", "9" * 1000])
def test_action_that_is_no_number_loses(action: str) -> None:
    game = GuessNumber()
    game.reset({"seed": 0})
    turn = game.step(action)
    assert turn.done
    assert turn.reward == 0.0


def test_numbers_out_of_range_are_wrong_guesses() -> None:
    game = GuessNumber(20, max_guesses=3)
    game.reset({"seed": 0})
    assert game.step("0").observation == "Higher."
    assert game.step(" 21\n").observation == "Lower."
    assert game.step("99").done


def test_calculator_computes_the_product() -> None:
    for seed in range(200):
        episode = Multiplication()
        prompt = episode.reset({"seed": seed})
        first, second = map(int, prompt.split("*"))
        answer = str(first * second)
        assert len(answer) == 5
        turn = episode.step(CALL % prompt)
        assert not turn.done
        assert turn.observation == [{"role": "tool", "content": answer, "name": "calculator"}]
        turn = episode.step(answer)
        assert (turn.reward, turn.done, turn.info) == (1.0, True, {"tool_calls": 1, "tool_errors": 0})
        episode.reset({"seed": seed})
        episode.step(CALL % prompt)
        assert episode.step(str(first * second + 1)).reward == 0.0


@pytest.mark.parametrize(
    "action",
    ["<tool_call></tool_call>", "<tool_call>[]</tool_call>", CALL % "9**9**9", CALL % "x", CALL % '"'],
    ids=str,
)
def test_wrong_call_is_answered_by_a_short_message(action: str) -> None:
    episode = Multiplication()
    episode.reset({"seed": 0})
    turn = episode.step(action)
    assert not turn.done
    [message] = turn.observation
    assert message["role"] == "tool"
    assert 0 < len(message["content"]) <= 100
    assert turn.info == {"tool_calls": 1, "tool_errors": 1}


@pytest.mark.parametrize("name", ["GuessNumber", "Multiplication"])
def test_episode_host_runs_it(name: str) -> None:
    host = EpisodeHost(f"nemo_rl.environments.games.{name}", {})
    try:
        host.submit([Request(0, "reset", {"seed": 1}), Request(0, "step", "nothing")])
        replies = host.collect(10)
        while len(replies) < 2:
            replies += host.collect(10)
    finally:
        host.shutdown()
    reset, step = replies
    assert [tool["function"]["name"] for tool in reset.value["tools"]] == ["calculator"] * (name == "Multiplication")
    assert (step.value["reward"], step.value["done"]) == (0.0, True)
