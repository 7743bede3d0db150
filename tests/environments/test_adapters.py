"""Adapters of other libraries, each in its registered venv."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.distributed.ray_actor_environment_registry import get_actor_python_env
from nemo_rl.environments.episode_calls import Request
from nemo_rl.environments.episode_process import EpisodeProcess
from nemo_rl.venvs import create_local_venv

ADAPTERS = "nemo_rl.environments.adapters."
PROJECT = Path(__file__).resolve().parents[2]
GAME = ADAPTERS + "openenv_game"
Call = Callable[..., dict[str, Any]]


def python_of(adapter: str) -> str:
    return create_local_venv(get_actor_python_env(ADAPTERS + adapter), ADAPTERS + adapter)


@pytest.fixture
def start() -> Iterator[Callable[[str, dict[str, Any]], Call]]:
    """Return a function that starts an environment, and returns a function that calls its episodes."""
    processes: list[EpisodeProcess] = []

    def make(adapter: str, config: dict[str, Any]) -> Call:
        process = EpisodeProcess(python_of(adapter), ADAPTERS + adapter, config)
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
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    call = start("reasoning_gym.ReasoningGym", {"dataset": "chain_sum", "options": options})
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
    call = start("textarena.TextArena", {"game": "GuessTheNumber-v0"})

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

    short = {"game": "GuessTheNumber-v0", "prompt": "Guess a number from 1 to 20", "action_format": "[{}]"}
    call = start("textarena.TextArena", short)
    assert said(call(0, "reset", {"seed": 3})) == "Guess a number from 1 to 20"
    assert said(call(0, "step", "10")) == games[3][1]


SERVER = f"""
import socket
import uvicorn
from openenv.core.env_server.http_server import create_fastapi_app
from {GAME} import Answer, Guess, GuessNumber

listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
app = create_fastapi_app(GuessNumber, Guess, Answer, max_concurrent_envs=8)
uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
"""

# Environments of several kinds: with coroutines, with tools of an MCP server, and some that the adapter refuses.
MODULE = """
import threading

from fastmcp import FastMCP
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.types import Action, Observation, State


class Move(Action):
    x: int
    y: int = 0


class Board(Observation):
    text: str
    moves: list[int] = []


class Unsafe(Environment):
    def __init__(self):
        super().__init__()
        self.thread = threading.get_ident()

    def reset(self, episode_id=None, row=0):  # accepts no seed
        return Board(text=f"row {row}", metadata={"solution": 7})

    def step(self, action: Move):
        assert threading.get_ident() == self.thread
        return Board(text="moved", moves=[action.x, action.y], reward=True, done=action.x == 9)

    @property
    def state(self):
        return State()


class Grid(Unsafe):
    SUPPORTS_CONCURRENT_SESSIONS = True


class Coroutines(Grid):
    async def reset_async(self, seed=None, **kwargs):
        return Board(text=f"seed {seed}, {kwargs}")

    async def step_async(self, action):
        return Board(text=f"went to {action.x}", done=True)


class Untyped(Grid):
    def step(self, action):
        raise AssertionError


class Tools(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        server = FastMCP("sums")
        server.tool(self.add)
        super().__init__(server)

    def add(self, a: int, b: int) -> int:
        return a + b

    def reset(self, seed=None, episode_id=None, **kwargs):
        return Board(text="add")

    def _step_impl(self, action, **kwargs):
        raise AssertionError

    @property
    def state(self):
        return State()
"""


@pytest.fixture
def openenv_url() -> Iterator[str]:
    """Yield the address of a server of the guessing game."""
    command = [python_of("openenv.OpenEnv"), "-c", SERVER]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.kill()


@pytest.fixture
def openenv_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the module `samples`. The process of an environment gets the source directories of this one."""
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "samples.py"
    path.write_text(MODULE)
    return path


def said(value: dict[str, Any]) -> str:
    [message] = value["messages"]
    assert message["role"] == "user"
    return message["content"]


def guess_by_halves(call: Call, episode: int, seed: int, action: str) -> tuple[list[str], dict[str, Any]]:
    """Play one guessing game; return what the game says and the last turn."""
    texts = [said(call(episode, "reset", {"seed": seed}))]
    low, high = 1, 20
    while True:
        guess = (low + high) // 2
        turn = call(episode, "step", action.format(guess))
        if turn["done"]:
            return texts, turn
        texts.append(said(turn))
        low, high = (guess + 1, high) if texts[-1] == "Higher." else (low, guess - 1)


def check_game(call: Call, action: str, invalid: dict[str, str]) -> None:
    """Win some games with the actions `action`, and lose one by the actions of `invalid`, which have reasons."""
    games = [guess_by_halves(call, seed, seed, action) for seed in range(4)]
    assert {texts[0] for texts, _ in games} == {"Guess a number from 1 to 20"}
    assert len({len(texts) for texts, _ in games}) > 1
    assert [turn["reward"] for _, turn in games] == [1.0] * 4
    assert guess_by_halves(call, 9, 3, action)[0] == games[3][0]

    call(10, "reset", {"seed": 1})
    assert said(call(10, "step", action.format(1))) == "Higher."
    for number, (text, reason) in enumerate(invalid.items(), 1):
        turn = call(10, "step", text)
        assert said(turn).startswith(f"Invalid action: {reason}")
        assert (turn["reward"], turn["done"], turn["info"]) == (0.0, number == 3, {"invalid_actions": number})


@pytest.mark.slow  # builds a venv
def test_openenv_in_process(start) -> None:
    reason = "number: Input should be a valid integer"
    call = start("openenv.OpenEnv", {"environment": f"{GAME}.GuessNumber"})
    check_game(call, "<think>1</think> {}\n", {"ten": reason, "": reason, '{"number": 3}': reason})


@pytest.mark.slow  # builds a venv
def test_openenv_on_a_server(start, openenv_url: str) -> None:
    refused, no_json = "the environment does not accept its fields", "it is not JSON"
    call = start("openenv.OpenEnv", {"url": openenv_url})
    check_game(call, '{{"number": {}}}', {'{"guess": 1}': refused, "3": "it is not a JSON object", "[" * 5000: no_json})
    call = start("openenv.OpenEnv", {"url": openenv_url, "action": f"{GAME}.Guess"})
    assert said(call(0, "reset", {"seed": 1}))
    assert "valid integer" in said(call(0, "step", "ten"))


@pytest.mark.slow  # builds a venv
def test_openenv_texts_of_several_fields(start, openenv_module: Path) -> None:
    config = {"environment": "samples.Grid", "instruction": "Move.", "reset": {"row": 3}}
    call = start("openenv.OpenEnv", config)
    assert said(call(0, "reset", {"seed": 1})) == 'Move.\n{"text": "row 3", "moves": []}'
    assert "x: Field required" in said(call(0, "step", "{}"))
    turn = call(0, "step", '{"x": "4"}')
    assert said(turn) == '{"text": "moved", "moves": [4, 0]}'
    assert (turn["reward"], turn["done"]) == (1.0, False)

    config = {"environment": "samples.Grid", "observation": "{text}: {moves}", "problem_fields": ["row"]}
    call = start("openenv.OpenEnv", {**config, "action_field": "x"})
    assert said(call(0, "reset", {"seed": 1, "row": 5})) == "row 5: []"
    turn = call(0, "step", "9")
    assert (said(turn), turn["done"]) == ("moved: [9, 0]", True)


@pytest.mark.slow  # builds a venv
def test_openenv_with_coroutines_and_with_mcp_tools(start, openenv_module: Path) -> None:
    call = start("openenv.OpenEnv", {"environment": "samples.Coroutines", "observation": "{text}"})
    assert said(call(0, "reset", {"seed": 2**32 + 5})) == "seed 5, {}"
    assert said(call(0, "step", '{"x": 1}')) == "went to 1"

    call = start("openenv.OpenEnv", {"environment": "samples.Tools"})
    assert said(call(0, "reset", {"seed": 1})) == '{"text": "add", "moves": []}'
    turn = call(0, "step", '{"type": "call_tool", "tool_name": "add", "arguments": {"a": 17, "b": 4}}')
    assert json.loads(said(turn))["result"]["data"] == 21
    assert said(call(0, "step", '{"x": 1}')).startswith("Invalid action: x: Extra inputs are not permitted")

    config = {"environment": "samples.Tools", "observation": "{text}", "call_format": "hermes"}
    call = start("openenv.OpenEnv", config)
    first = call(0, "reset", {"seed": 1})
    assert said(first) == "add"
    [tool] = first["tools"]
    assert tool["function"]["name"] == "add"
    assert tool["function"]["parameters"]["required"] == ["a", "b"]
    add = '<tool_call>{"name": "add", "arguments": {"a": %s, "b": %s}}</tool_call>'
    turn = call(0, "step", f"First {add % (17, 4)} then {add % (2, 3)}")
    assert [(message["role"], message["content"]) for message in turn["messages"]] == [("tool", "21"), ("tool", "5")]
    [message] = call(0, "step", add % (1, '"x"'))["messages"]
    assert message["content"].startswith("Error: ")
    assert said(call(0, "step", "21")) == "Invalid action: it calls no tool"
    assert said(call(0, "step", f"{add % (1, 2)}<tool_call>{{</tool_call>")).startswith("Invalid action: ")


REFUSED = [
    ({}, "set either `environment`"),
    ({"environment": "samples.Grid", "url": "http://localhost:1"}, "set either `environment`"),
    ({"environment": "samples.Move"}, "samples.Move is not a class that derives from openenv's Environment"),
    ({"environment": "samples.Unsafe"}, "samples.Unsafe.SUPPORTS_CONCURRENT_SESSIONS is False"),
    ({"environment": "samples.Untyped"}, "the type hint of samples.Untyped.step does not name the class"),
]
REFUSE = """
import json
import sys
from nemo_rl.environments.adapters.openenv import OpenEnv

for config in json.loads(sys.argv[1]):
    try:
        OpenEnv(**config)
    except ValueError as error:
        print(error)
    else:
        print("accepted")
"""


@pytest.mark.slow  # builds a venv
def test_openenv_refuses(openenv_module: Path) -> None:
    command = [python_of("openenv.OpenEnv"), "-c", REFUSE, json.dumps([config for config, _ in REFUSED])]
    env = {**os.environ, "PYTHONPATH": f"{openenv_module.parent}:{PROJECT}"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.startswith(message) for line, (_, message) in zip(lines, REFUSED, strict=True)] == [True] * 5, lines


# Tasks with one turn, or with a tool.
SUMS = """
import verifiers.v1 as vf
from sums_tools import Calculator

__all__ = ["Sums"]


class SumConfig(vf.TaskConfig):
    has_tool: bool = False


class SumData(vf.TaskData):
    answer: str


class Sum(vf.Task[SumData, vf.State, SumConfig]):
    @vf.reward(weight=2.0)
    async def right(self, trace):
        if trace.last_reply == "fail":
            raise ValueError("no score")
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.5)
    async def brief(self, trace):
        return float(len(trace.last_reply) < 5)

    @vf.metric
    async def length(self, trace):
        return len(trace.last_reply)

    @classmethod
    def toolsets(cls, config):
        return [Calculator(vf.ToolsetConfig())] if config.has_tool else []


class SumsConfig(vf.TasksetConfig):
    task: SumConfig = SumConfig()


class Sums(vf.Taskset[Sum, SumsConfig]):
    def load(self):
        for number in range(10):
            data = SumData(prompt=f"{number}+{number}", answer=str(2 * number), system_prompt="Add.")
            yield Sum(data, self.config.task)
"""

SUMS_TOOLS = """
import verifiers.v1 as vf


class Calculator(vf.Toolset[vf.ToolsetConfig, vf.State]):
    @vf.tool
    async def add(self, a: int, b: int) -> int:
        return a + b


if __name__ == "__main__":
    Calculator.run()
"""


@pytest.fixture
def sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a module with a taskset."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "sums_v1.py").write_text(SUMS)
    (tmp_path / "sums_tools.py").write_text(SUMS_TOOLS)
    return "sums_v1"


@pytest.mark.slow  # builds a venv
def test_verifiers_environment_of_several_turns(start) -> None:
    game = ADAPTERS + "verifiers_game"
    call = start("verifiers.Verifiers", {"taskset": game, "num_tasks": 30, "num_validation_tasks": 10})
    games = [guess_by_halves(call, seed, seed, "{}") for seed in range(4)]
    assert {texts[0] for texts, _ in games} == {"Guess a number from 1 to 20"}
    for texts, turn in games:
        assert (turn["reward"], turn["info"]) == (1.0, {"won": 1.0, "guesses": len(texts)})
    # A game that is lost has a reward, too.
    call(7, "reset", {"seed": 0})
    turn = call(7, "step", "I do not know.")
    assert (turn["reward"], turn["done"], turn["info"]) == (0.0, True, {"won": 0.0, "guesses": 1.0})


@pytest.mark.slow  # builds a venv
def test_verifiers_taskset(start, sums: str) -> None:
    call = start("verifiers.Verifiers", {"taskset": sums, "num_validation_tasks": 3})
    first = call(0, "reset", {"seed": 4})
    assert first["messages"] == [{"role": "system", "content": "Add."}, {"role": "user", "content": "4+4"}]
    turn = call(0, "step", "8")
    assert (turn["reward"], turn["done"], turn["info"]) == (2.5, True, {"right": 2.0, "brief": 0.5, "length": 1.0})
    # There are 7 tasks for training, and the last 3 are for validation.
    prompts = [call(1, "reset", {"seed": seed})["messages"][1]["content"] for seed in (6, 7, 2**31, 2**31 + 5)]
    assert prompts == ["6+6", "0+0", "7+7", "9+9"]
    assert call(1, "step", "It is 18.")["reward"] == 0.0
    call(2, "reset", {"seed": 4})
    with pytest.raises(AssertionError, match="TaskError.*no score"):
        call(2, "step", "fail")


@pytest.mark.slow  # builds a venv
def test_verifiers_tools(start, sums: str) -> None:
    call = start("verifiers.Verifiers", {"taskset": {"id": sums, "task": {"has_tool": True}}})
    first = call(0, "reset", {"seed": 4})
    [tool] = first["tools"]
    name = tool["function"]["name"]
    turn = call(0, "step", f'<tool_call>{{"name": "{name}", "arguments": {{"a": 4, "b": 4}}}}</tool_call>')
    [message] = turn["messages"]
    assert (message["role"], message["content"], turn["continues"]) == ("tool", "8", 0)
    assert call(0, "step", message["content"])["reward"] == 2.5


@pytest.mark.slow  # builds a venv
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"taskset": "no_such_taskset"}, "taskset 'no_such_taskset' not found"),
        ({"taskset": ADAPTERS + "verifiers_game"}, "is endless: set num_tasks"),
        ({"taskset": "sums_v1", "num_validation_tasks": 10}, "has 10 tasks; leave at least one for training"),
        ({"taskset": "sums_v1", "env": {"agent": {"max_turn": 3}}}, "max_turn"),
    ],
)
def test_verifiers_refuses(config: dict[str, Any], message: str, start, sums: str) -> None:
    with pytest.raises(AssertionError, match=message):
        start("verifiers.Verifiers", config)(0, "reset", {"seed": 1})
