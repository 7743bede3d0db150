"""Episodes with tools: calls, errors that the model reads, final answers, and configurations that are wrong."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, ClassVar

import pytest

from nemo_rl.environments.episode_host import EpisodeHost, Request
from nemo_rl.environments.tools.tool_calls import ToolCall, render_calls
from nemo_rl.environments.tools.tool_environment import ToolEnvironment
from nemo_rl.environments.tools.tool_set import ToolSet
from nemo_rl.errors import ConfigError, EnvironmentFailure

REPOSITORY = Path(__file__).resolve().parents[3]
HERE = f"{__name__}."


def double(number: int) -> int:
    """Double a number."""
    return 2 * number


async def later(text: str) -> dict[str, str]:
    """Return the text."""
    return {"text": text}


def long(count: int) -> str:
    """Write many digits."""
    return "".join(str(index % 10) for index in range(count))


def surrogate() -> str:
    """Return text that cannot be encoded."""
    return "a\ud800"


def fail(kind: str) -> str:
    """Fail."""
    raise {
        "value": ValueError("no such city"),
        "lookup": KeyError("x"),
        "arithmetic": ZeroDivisionError("division by zero"),
        "failure": EnvironmentFailure("the index is down"),
        "connection": ConnectionError("the index is down"),
        "bug": AttributeError("a bug"),
    }[kind]


class Counter(ToolSet):
    """Has state of its own in each episode."""

    closed: ClassVar[list[int]] = []

    def __init__(self, start: int = 0) -> None:
        self.count = start

    def reset(self, problem: dict[str, Any]) -> None:
        self.count += problem.get("extra", 0)

    def increase(self, by: int = 1) -> int:
        """Increase the counter."""
        self.count += by
        return self.count

    def _helper(self) -> None:
        raise AssertionError

    def close(self) -> None:
        self.closed.append(self.count)


class Twice(Counter):
    async def increase(self, by: int = 1) -> int:
        """Increase the counter twice."""
        self.count += 2 * by
        return self.count


class Plain:
    """Is no tool."""


class LengthEnvironment(ToolEnvironment):
    def score(self, text: str, problem: dict[str, Any]) -> float:
        return len(text) / problem["length"]


class AsyncEnvironment(ToolEnvironment):
    async def score(self, text: str, problem: dict[str, Any]) -> float:  # type: ignore[override]
        return 0.25


def episode(*tools: Any, problem: dict[str, Any] | None = None, **options: Any) -> ToolEnvironment:
    made = ToolEnvironment(tools, **{"score": "operator.eq", **options})
    made.reset({"answer": "4", **(problem or {})})
    return made


def call(name: str, **arguments: Any) -> str:
    return render_calls([ToolCall(name, arguments)])


def result(made: ToolEnvironment, name: str, **arguments: Any) -> str:
    [message] = made.step(call(name, **arguments)).observation  # type: ignore[misc]
    return message["content"]  # type: ignore[index]


def test_calls_are_answered_and_the_answer_is_scored() -> None:
    made = episode(double, "calculator")
    assert [schema["function"]["name"] for schema in made.tools()] == ["double", "calculator"]
    turn = made.step(f"I compute.\n{call('double', number=1)}\n{call('calculator', expression='1+1')}")
    assert turn.observation == [
        {"role": "tool", "content": "2", "name": "double"},
        {"role": "tool", "content": "2", "name": "calculator"},
    ]
    assert (turn.done, turn.reward, turn.info) == (False, 0.0, {"tool_calls": 2, "tool_errors": 0})
    turn = made.step(" 4\n")
    assert (turn.done, turn.reward, turn.info) == (True, 1.0, {"tool_calls": 2, "tool_errors": 0})


def test_id_of_a_call_is_returned() -> None:
    made = episode(double, call_format="mistral")
    [message] = made.step(render_calls([ToolCall("double", {"number": 1}, id="abc123def")], "mistral")).observation
    assert message == {"role": "tool", "content": "2", "name": "double", "tool_call_id": "abc123def"}


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (call("duoble", number=1), "Error: there is no tool 'duoble'; did you mean 'double'?"),
        (call("zzz" * 99), "there is no tool 'zzz"),
        (call("double"), "Error: double needs the argument 'number'"),
        (call("double", number=1, base=2), 'Error: double has no argument "base"; there are: number'),
        (call("double", number="1"), "Error: the argument 'number' of double must be an integer, not \"1\""),
        ("<tool_call>{double}</tool_call>", "Error: the tool call cannot be read: "),
        (call("fail", kind="value"), "Error: no such city"),
        (call("fail", kind="lookup"), "Error: KeyError: 'x'"),
        (call("fail", kind="arithmetic"), "Error: ZeroDivisionError: division by zero"),
    ],
)
def test_model_reads_what_was_wrong(action: str, message: str) -> None:
    made = episode(double, fail)
    turn = made.step(action)
    [answer] = turn.observation  # type: ignore[misc]
    assert message in answer["content"]  # type: ignore[index]
    assert len(answer["content"]) < 300  # type: ignore[index]
    assert (turn.done, turn.info) == (False, {"tool_calls": 1, "tool_errors": 1})
    assert made.step(call("double", number=1)).info == {"tool_calls": 2, "tool_errors": 1}


@pytest.mark.parametrize("kind", ["failure", "connection", "bug"])
def test_other_exceptions_are_failures_of_the_environment(kind: str) -> None:
    with pytest.raises((EnvironmentFailure, ConnectionError, AttributeError)):
        episode(fail).step(call("fail", kind=kind))


def test_thinking_is_neither_searched_nor_scored() -> None:
    made = episode(double)
    turn = made.step(f"<think>Maybe {call('double', number=1)}?</think>\n4")
    assert (turn.done, turn.reward) == (True, 1.0)


def test_results_are_text() -> None:
    made = episode(later, surrogate, long, max_output_chars=20)
    assert result(made, "later", text="é") == '{"text": "é"}'
    assert result(made, "surrogate") == "a?"
    assert result(made, "long", count=20) == "01234567890123456789"
    assert result(made, "long", count=101) == "0123456789\n[81 characters left out]\n1234567890"


@pytest.mark.parametrize("text", ["\\ud800", "x" * 9999])
def test_messages_can_be_encoded_and_are_short(text: str) -> None:
    calls = f'[{{"name": "{text}", "id": "{text}"}}, {{"name": "double", "arguments": {{"{text}": "{text}"}}}}]'
    turn = episode(double, call_format="mistral").step(f"[TOOL_CALLS] {calls}")
    assert len(turn.observation) == 2  # type: ignore[arg-type]
    for message in turn.observation:  # type: ignore[union-attr]
        for value in message.values():  # type: ignore[union-attr]
            assert len(value.encode()) < 200


def test_calls_beyond_the_limit_are_not_run() -> None:
    made = episode("calculator", Counter(), max_calls_per_turn=2)
    turn = made.step("\n".join([call("increase")] * 3))
    assert [message["content"] for message in turn.observation] == [  # type: ignore[index, union-attr]
        "1",
        "2",
        "Error: not run, because a message may contain at most 2 calls",
    ]
    assert turn.info == {"tool_calls": 3, "tool_errors": 1}
    assert result(made, "increase") == "3"


def test_each_episode_has_its_own_tool_set() -> None:
    tool = {"name": f"{HERE}Counter", "start": 5}
    first, second = episode(tool, problem={"extra": 1}), episode(tool)
    assert result(first, "increase", by=2) == "8"
    assert result(second, "increase") == "6"
    Counter.closed.clear()
    first.close()
    assert Counter.closed == [8]


def test_method_of_a_derived_tool_set_replaces_that_of_its_base() -> None:
    made = episode(Twice())
    assert len(made.tools()) == 1
    assert result(made, "increase") == "2"


def test_score_can_be_overridden() -> None:
    made = LengthEnvironment([double])
    made.reset({"length": 4})
    assert made.step("<think>x</think> ab ").reward == 0.5
    assert AsyncEnvironment().step("x").reward == 0.25


def test_host_runs_a_configured_environment() -> None:
    config = {"tools": ["calculator", {"name": "python"}], "score": "operator.eq", "call_format": "llama3"}
    host = EpisodeHost("nemo_rl.environments.tools.tool_environment.ToolEnvironment", config)
    actions = [render_calls([ToolCall("calculator", {"expression": "6 * 7"})], "llama3"), "42"]
    host.submit([Request(0, "reset", {"answer": "42"}), *(Request(0, "step", action) for action in actions)])
    replies = []
    while len(replies) < 3:
        replies += host.collect(timeout_s=60)
    host.shutdown()
    assert [reply.failure for reply in replies] == [None] * 3
    first, second, third = [reply.value for reply in replies]
    assert [schema["function"]["name"] for schema in first["tools"]] == ["calculator", "python"]
    assert second["messages"] == [{"role": "tool", "content": "42", "name": "calculator"}]
    assert (third["reward"], third["done"], third["info"]) == (1.0, True, {"tool_calls": 1, "tool_errors": 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": ["calcluator"]}, "unknown tool 'calcluator'; did you mean 'calculator'?"),
        ({"tools": ["nowhere.tool"]}, "the tool 'nowhere.tool' cannot be imported: No module named 'nowhere'"),
        ({"tools": [{"start": 1}]}, "has no name"),
        ({"tools": [{"name": "calculator", "digits": 1}]}, "is a function and takes no options"),
        ({"tools": [{"name": f"{HERE}Counter", "strat": 1}]}, "does not accept the options ['strat']"),
        ({"tools": [f"{HERE}Plain"]}, "does not derive from ToolSet"),
        ({"call_format": "xml"}, "unknown call format 'xml'"),
        ({"score": "operator.equal"}, "the scoring function 'operator.equal' cannot be imported"),
        ({"score": "math.pi"}, "the scoring function 'math.pi' is a float, not a function"),
        ({"score": None}, "ToolEnvironment has no scoring function"),
    ],
)
def test_wrong_configuration_is_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ToolEnvironment(**{"score": "operator.eq", **options})


def test_score_that_would_not_be_used_is_refused() -> None:
    with pytest.raises(ConfigError, match="overrides the method `score`"):
        LengthEnvironment(score="operator.eq")


@pytest.mark.parametrize(
    ("tools", "error", "message"),
    [
        ((double, double), ValueError, "two tools are named 'double'"),
        ((Plain(),), TypeError, "is no tool"),
        ((Plain,), TypeError, "is no tool"),
    ],
)
def test_tools_that_cannot_be_used_are_refused(tools: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        episode(*tools)


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from nemo_rl.environments.tools.tool_environment import ToolEnvironment
made = ToolEnvironment(["calculator", "python"], score="operator.eq")
made.reset({{"answer": "4"}})
print([schema["function"]["name"] for schema in made.tools()])
for tool, arguments in (("calculator", '{{"expression": "2+2"}}'), ("python", '{{"code": "print(2+2)"}}')):
    print(made.step(f'<tool_call>{{{{"name": "{{tool}}", "arguments": {{arguments}}}}}}</tool_call>').observation)
print(made.step("4").reward)
"""


def pythons() -> list[str]:
    """Return this Python and, where it is installed, Python 3.10, the oldest that an environment may use."""
    installed = Path(sys.base_prefix).parent.glob("*3.10*/bin/python3.10")
    return [sys.executable, *map(str, installed)]


@pytest.mark.parametrize("python", pythons())
def test_tools_need_only_the_standard_library(python: str) -> None:
    code = textwrap.dedent(PROGRAM).format(root=str(REPOSITORY))
    done = subprocess.run([python, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == [
        "[{'role': 'tool', 'content': '4', 'name': 'calculator'}]",
        "[{'role': 'tool', 'content': '4\\n', 'name': 'python'}]",
        "1.0",
    ]


def test_python_of_the_documentation_runs() -> None:
    page = (REPOSITORY / "docs" / "environment-tools.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 2
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
