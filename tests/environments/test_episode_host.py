"""Episodes in one process: order, failures, and what an environment may return."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from episode_replies import next_replies

from nemo_rl.environments.episode import Environment, Turn
from nemo_rl.environments.episode_host import EpisodeHost, Request

NAME = f"{__name__}."


class Countdown(Environment):
    """Ends when the actions have reached the problem's number."""

    closed: ClassVar[list[int]] = []

    def __init__(self, reward: float = 1.0) -> None:
        self.reward = reward

    def reset(self, problem: dict[str, Any]) -> str:
        self.left = problem["number"]
        return f"{self.left} left"

    def step(self, action: str) -> Turn:
        self.left -= int(action)
        if self.left == 0:
            return Turn(self.reward, done=True, info={"won": True}, answer=action)
        return Turn(observation=[{"role": "tool", "content": f"{self.left} left"}])

    def close(self) -> None:
        self.closed.append(self.left)


class Meeting(Environment):
    """Ends only if two episodes take their steps at the same time."""

    barrier = threading.Barrier(2, timeout=60)

    def step(self, action: str) -> Turn:
        self.barrier.wait()
        return Turn(done=True)


class Coroutines(Environment):
    async def reset(self, problem: dict[str, Any]) -> str:
        await asyncio.sleep(0)
        return "begin"

    async def step(self, action: str) -> Turn:
        await asyncio.sleep(0)
        return Turn(reward=2.0, done=True)


class Returns(Environment):
    """Returns what the problem says."""

    def reset(self, problem: dict[str, Any]) -> Any:
        self.turn = problem.get("turn")
        return problem.get("observation")

    def step(self, action: str) -> Any:
        return self.turn


class Bare:
    """Has only the two required methods and no base class."""

    def reset(self, problem: dict[str, Any]) -> None:
        return None

    def step(self, action: str) -> Turn:
        return Turn(reward=len(action), done=True)


def is_equal(completion: str, answer: str, ignore_case: bool = False) -> bool:
    return completion.lower() == answer.lower() if ignore_case else completion == answer


NOT_AN_ENVIRONMENT = 3


@pytest.fixture
def start() -> Iterator[Callable[..., EpisodeHost]]:
    hosts: list[EpisodeHost] = []

    def make(name: str, concurrency: int = 4, **config: Any) -> EpisodeHost:
        hosts.append(EpisodeHost(NAME + name, config, concurrency=concurrency))
        return hosts[-1]

    yield make
    for host in hosts:
        host.shutdown()


def test_calls_of_an_episode_run_in_order(start) -> None:
    host = start("Countdown", reward=0.5)
    actions = ["1", "2", "3"]
    for episode in range(8):
        host.submit([Request(episode, "reset", {"number": 6})])
        host.submit([Request(episode, "step", action) for action in actions])
    found = next_replies(host, 32)
    for episode in range(8):
        values = [reply.value for reply in found if reply.episode == episode]
        assert values == [
            {"messages": [{"role": "user", "content": "6 left"}], "tools": []},
            *(
                {
                    "reward": 0.0,
                    "messages": [{"role": "tool", "content": f"{left} left"}],
                    "done": False,
                    "truncated": False,
                    "info": {},
                    "answer": None,
                }
                for left in (5, 3)
            ),
            {
                "reward": 0.5,
                "messages": None,
                "done": True,
                "truncated": False,
                "info": {"won": 1.0},
                "answer": "3",
            },
        ]
    assert json.loads(json.dumps([reply.value for reply in found])) == [reply.value for reply in found]


def test_episodes_run_at_the_same_time(start) -> None:
    host = start("Meeting")
    host.submit([Request(episode, method, {}) for episode in range(2) for method in ("reset", "step")])
    assert [reply.failure for reply in next_replies(host, 4)] == [None] * 4


def test_coroutines(start) -> None:
    host = start("Coroutines")
    host.submit([Request(episode, method, {}) for episode in range(6) for method in ("reset", "step")])
    rewards = [reply.value["reward"] for reply in next_replies(host, 12) if "reward" in reply.value]
    assert rewards == [2.0] * 6


def test_close_and_a_second_reset_release_the_episode(start) -> None:
    host = start("Countdown")
    Countdown.closed.clear()
    host.submit([Request(0, "reset", {"number": 6}), Request(0, "reset", {"number": 7}), Request(0, "close")])
    host.submit([Request(0, "step", "1")])
    *_, last = next_replies(host, 3)
    assert last.failure is not None
    assert "step was called before reset" in last.failure
    assert Countdown.closed == [6, 7]


def test_scoring_function(start) -> None:
    host = start("is_equal", ignore_case=True)
    host.submit([Request(0, "reset", {"answer": "Yes"}), Request(0, "step", "yES")])
    reset, step = next_replies(host, 2)
    assert reset.value == {"messages": None, "tools": []}
    assert step.value["reward"] == 1.0
    assert step.value["done"]


def test_base_class_is_optional(start) -> None:
    host = start("Bare")
    host.submit([Request(0, "reset", {}), Request(0, "step", "four"), Request(0, "close")])
    assert next_replies(host, 2)[1].value["reward"] == 4.0


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (1.0, "step returned 1.0; return a nemo_rl.environments.episode.Turn"),
        (Turn(reward=float("nan"), done=True), "the reward is nan; it must be finite"),
        (Turn(reward=None, done=True), "the reward is None; it must be a number"),  # type: ignore[arg-type]
        (Turn(), "a Turn without an observation that does not end the episode"),
        (Turn(observation=[]), "step returned an empty list as its observation"),
        (Turn(observation=3), "step returned 3 as its observation; return text or chat messages"),  # type: ignore[arg-type]
        (Turn(observation=[{"content": "x"}]), "step returned {'content': 'x'} as a message"),
        (Turn(observation=[{"role": "assistant", "content": "x"}]), "only the model speaks in that role"),
        (Turn(done=True, info={"score": "high"}), "info['score'] is 'high'; it must be a number"),  # type: ignore[dict-item]
    ],
)
def test_invalid_turn_is_a_failure(start, turn: Any, message: str) -> None:
    host = start("Returns")
    host.submit([Request(0, "reset", {"turn": turn}), Request(0, "step", "x")])
    reply = next_replies(host, 2)[1]
    assert reply.value is None
    assert reply.failure is not None
    assert message in reply.failure
    assert "Returns.step raised" in reply.failure
    assert "Traceback" in reply.details


def test_failure_does_not_end_other_episodes(start) -> None:
    host = start("Countdown", concurrency=1)
    host.submit([Request(0, "reset", {}), Request(1, "reset", {"number": 1}), Request(1, "step", "1")])
    failed, _, step = next_replies(host, 3)
    assert failed.failure == f"{NAME}Countdown.reset raised KeyError: 'number'"
    assert step.value["done"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("no_such_module.Game", ImportError, "No module named 'no_such_module'"),
        (NAME + "Countdwn", ImportError, "has no 'Countdwn'"),
        (NAME + "NOT_AN_ENVIRONMENT", TypeError, "is a int; an environment is a class or a function"),
        ("builtins.dict", TypeError, "it has no method reset and no method step"),
    ],
)
def test_what_is_no_environment(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EpisodeHost(name, {})


def test_imports_the_standard_library_only() -> None:
    code = textwrap.dedent("""
        import sys
        before = set(sys.modules)
        import nemo_rl.environments.episode_host
        names = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(sorted(names - set(sys.stdlib_module_names) - {"nemo_rl"}))
    """)
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "[]"
