"""Agents: what an OpenAI client sees of the endpoint, and what becomes of its requests."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from episode_replies import next_replies

from nemo_rl.environments.agent import Agent, Model
from nemo_rl.environments.episode import Turn
from nemo_rl.environments.episode_calls import EpisodeRunner, Reply, Request
from nemo_rl.environments.episode_host import EpisodeHost
from nemo_rl.environments.episode_process import EpisodeProcess

# Agents share a process with their test: what they receive, by name.
SEEN: dict[str, Any] = {}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "truncated": False}


def client(model: Model) -> openai.OpenAI:
    return openai.OpenAI(base_url=model.base_url, api_key=model.api_key, max_retries=0, timeout=60)


def ask(model: Model, messages: list[Any], **options: Any) -> Any:
    with client(model) as api:
        return api.chat.completions.create(model="any-name", messages=messages, **options)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


class Dialogue(Agent):
    """Asks twice in one conversation."""

    def run(self, problem: dict[str, Any], model: Model) -> float:
        messages: list[Any] = [{"role": "developer", "content": "Be brief."}, user(problem["prompt"])]
        first = ask(model, messages)
        SEEN["first"] = first
        # An answer comes back without its white space, and with what the client added to it.
        message = first.choices[0].message.model_copy(update={"content": first.choices[0].message.content.strip()})
        second = ask(model, [*messages, message, user([{"type": "text", "text": "And now?"}])])
        return float(second.choices[0].message.content)


class Branching(Agent):
    """Goes back to an earlier action, then writes a summary of its own."""

    def run(self, problem: dict[str, Any], model: Model) -> Turn:
        start = [user("start")]
        both = [choice.message for choice in ask(model, start, n=2).choices]
        SEEN["choices"] = [message.content for message in both]
        last = ask(model, [*start, both[0], user("first")]).choices[0].message
        ask(model, [*start, both[1], user("second")])
        ask(model, [*start, both[0], user("first"), last, user("third")])
        ask(model, [*start, {"role": "assistant", "content": "a summary"}, user("go on")])
        ask(model, [*start, both[0], {"role": "assistant", "content": "a thought"}, user("go on")])
        return Turn(reward=3, truncated=problem.get("truncated", False), info={"calls": 6})


class Calling(Agent):
    """Uses a tool, streamed or not."""

    def run(self, problem: dict[str, Any], model: Model) -> float:
        messages = [user("What is the weather in Rome?")]
        if problem.get("stream"):
            with client(model) as api:
                options: Any = {"stream": True, "stream_options": {"include_usage": True}}
                chunks = list(
                    api.chat.completions.create(model="m", messages=messages, tools=[WEATHER], **options)  # type: ignore[call-overload]
                )
            SEEN["usage"] = chunks[-1].usage
            deltas = [chunk.choices[0] for chunk in chunks[:-1]]
            reply = deltas[0].delta
            SEEN["finish"] = deltas[-1].finish_reason
        else:
            choice = ask(model, messages, tools=[WEATHER]).choices[0]
            reply, SEEN["finish"] = choice.message, choice.finish_reason
        [call] = reply.tool_calls
        SEEN["call"] = (call.id, call.function.name, call.function.arguments)
        echo = reply.model_dump(exclude_none=True)
        for item in echo["tool_calls"]:
            item.pop("index", None)
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        answer = ask(model, [*messages, echo, result], tools=[WEATHER])
        return float(answer.choices[0].message.content == "It is sunny.")


class Parallel(Agent):
    """Sends several requests at once, from coroutines."""

    async def run(self, problem: dict[str, Any], model: Model) -> float:
        async with openai.AsyncOpenAI(base_url=model.base_url, api_key=model.api_key) as api:
            replies = await asyncio.gather(
                *(api.chat.completions.create(model="m", messages=[user(f"part {part}")]) for part in range(8))
            )
        texts = [reply.choices[0].message.content for reply in replies]
        return float(texts == [f"answer to part {part}" for part in range(8)])


class Idle(Agent):
    def run(self, problem: dict[str, Any], model: Model) -> float:
        return 1.0


class Raising(Agent):
    def run(self, problem: dict[str, Any], model: Model) -> float:
        ask(model, [user("?")])
        raise KeyError("no such page")


class Exiting(Agent):
    def run(self, problem: dict[str, Any], model: Model) -> float:
        sys.exit(3)


class Wrong(Agent):
    """Sends what the endpoint refuses, and remembers the errors."""

    def run(self, problem: dict[str, Any], model: Model) -> float:
        errors = SEEN["errors"] = []
        for options in problem["options"]:
            try:
                ask(model, **{"messages": [user("?")], **options})
            except openai.APIStatusError as error:
                errors.append((error.status_code, error.body["message"]))  # type: ignore[index]
        ask(model, [user("!")])
        return 0.0


class Stubborn(Agent):
    """Is still there when its episode has ended."""

    def run(self, problem: dict[str, Any], model: Model) -> float:
        SEEN["model"] = model
        try:
            ask(model, [user("?")])
        except openai.BadRequestError as error:
            SEEN["late"] = str(error)
        SEEN["ended"].set()
        return 0.0


@pytest.fixture
def host() -> Iterator[Callable[[type[Agent]], EpisodeHost]]:
    hosts: list[EpisodeHost] = []

    def make(agent: type[Agent]) -> EpisodeHost:
        hosts.append(EpisodeHost(f"{__name__}.{agent.__name__}", {}))
        return hosts[-1]

    SEEN.clear()
    yield make
    for made in hosts:
        made.shutdown()


def play(runner: EpisodeRunner, answers: Callable[[Any], str], problem: dict[str, Any] | None = None) -> list[Reply]:
    """Play one episode; `answers` sees the value of a reply. Returns the replies."""
    runner.submit([Request(0, "reset", {"seed": 1, **(problem or {})})])
    replies = next_replies(runner, 1)
    while (
        replies[-1].value is not None and not replies[-1].value.get("done") and not replies[-1].value.get("truncated")
    ):
        runner.submit([Request(0, "step", answers(replies[-1].value), USAGE)])
        replies += next_replies(runner, 1)
    runner.submit([Request(0, "close")])
    return replies


def scripted(*texts: str) -> Callable[[Any], str]:
    remaining = iter(texts)
    return lambda value: next(remaining)


def test_conversation_is_continued(host) -> None:
    replies = play(host(Dialogue), scripted(" yes\n", "4"), {"prompt": "Begin."})
    first, second, end = [reply.value for reply in replies]
    assert first == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Begin."}],
        "tools": [],
        "continues": None,
    }
    assert (second["messages"], second["continues"]) == ([{"role": "user", "content": "And now?"}], 0)
    assert (end["reward"], end["done"]) == (4.0, True)
    answer = SEEN["first"]
    assert answer.choices[0].message.content == " yes\n"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 2)


def test_branches(host) -> None:
    *replies, end = [reply.value for reply in play(host(Branching), scripted(*"abcdefg"))]
    assert SEEN["choices"] == ["a", "b"]
    assert [reply["continues"] for reply in replies] == [None, None, 0, 1, 2, None, None]
    assert [[message["content"] for message in reply["messages"]] for reply in replies] == [
        ["start"],
        ["start"],
        ["first"],
        ["second"],
        ["third"],
        ["start", "a summary", "go on"],
        ["start", "a", "a thought", "go on"],
    ]
    assert (end["reward"], end["info"]) == (3.0, {"calls": 6.0})


def test_end_that_tells_nothing(host) -> None:
    end = play(host(Branching), scripted(*"abcdefg"), {"truncated": True})[-1].value
    assert (end["done"], end["truncated"]) == (False, True)


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(host, stream: bool) -> None:
    call = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    replies = play(host(Calling), scripted(call, "It is sunny."), {"stream": stream})
    first, second, end = [reply.value for reply in replies]
    assert first["tools"] == [WEATHER]
    assert SEEN["call"] == ("call00000", "weather", '{"city": "Rome"}')
    assert SEEN["finish"] == "tool_calls"
    assert second["continues"] == 0
    assert second["messages"] == [{"role": "tool", "content": "sunny", "tool_call_id": "call00000"}]
    assert end["reward"] == 1
    if stream:
        assert SEEN["usage"].total_tokens == 9


def test_unreadable_call_is_text(host) -> None:
    replies = play(host(Calling), scripted("<tool_call>{"))
    assert "NoneType" in replies[-1].failure  # the agent has expected a call


def test_requests_of_coroutines_are_answered_one_by_one(host) -> None:
    replies = play(host(Parallel), lambda value: f"answer to {value['messages'][-1]['content']}")
    assert len(replies) == 9
    assert replies[-1].value["reward"] == 1


class Waiting(Agent):
    """Asks, and would then wait forever."""

    async def run(self, problem: dict[str, Any], model: Model) -> float:
        async with openai.AsyncOpenAI(base_url=model.base_url, api_key=model.api_key) as api:
            await api.chat.completions.create(model="m", messages=[user("?")])
        try:
            await asyncio.Event().wait()
        finally:
            SEEN["ended"].set()
        return 0.0


def test_coroutine_is_cancelled_at_the_end(host) -> None:
    SEEN["ended"] = threading.Event()
    runner = host(Waiting)
    runner.submit([Request(0, "reset", {"seed": 0})])
    next_replies(runner, 1)
    episode = runner._episodes[0].environment
    runner.submit([Request(0, "step", "!")])
    while episode._num_actions == 0 or episode._loop is None:
        time.sleep(0.01)
    episode.close()  # as the host does after the call; here the call would never end
    assert SEEN["ended"].wait(60)
    [reply] = next_replies(runner, 1)
    assert "it ended with CancelledError" in reply.failure


def test_failures(host) -> None:
    [idle] = play(host(Idle), scripted())
    assert idle.failure.endswith("Idle.run raised RuntimeError: it ended without a request to the model")
    raising = play(host(Raising), scripted("?"))[-1]
    assert raising.failure.endswith("Raising.run raised KeyError: 'no such page'")
    assert "in run" in raising.details
    [exiting] = play(host(Exiting), scripted())
    assert exiting.failure.endswith("Exiting.run raised RuntimeError: it ended with SystemExit(3)")


REFUSED = {
    "stop strings": ({"stop": ["\n"]}, "policy.generation.stop_strings"),
    "a format": ({"response_format": {"type": "json_object"}}, "response_format"),
    "a forced tool": ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice"),
    "log-probabilities": ({"logprobs": True}, "logprobs=true is not supported"),
    "no message": ({"messages": []}, "at least one message"),
    "a begun answer": ({"messages": [{"role": "assistant", "content": "I"}]}, "does not continue a begun answer"),
    "an image": ({"messages": [user([{"type": "image_url", "image_url": {"url": "u"}}])]}, "must be text"),
    "no role": ({"messages": [{"content": "x"}]}, "needs a role"),
    "no choice": ({"n": 0}, "n must be a number from 1"),
}


def test_what_cannot_be_served_is_refused(host) -> None:
    [*_, end] = play(host(Wrong), scripted("."), {"options": [options for options, _ in REFUSED.values()]})
    assert end.failure is None
    assert len(SEEN["errors"]) == len(REFUSED)
    for (status, message), (_, expected) in zip(SEEN["errors"], REFUSED.values(), strict=True):
        assert status == 400
        assert expected in message


def test_key_is_needed_and_ends_with_the_episode(host) -> None:
    SEEN["ended"] = threading.Event()
    runner = host(Stubborn)
    runner.submit([Request(0, "reset", {"seed": 0})])
    next_replies(runner, 1)
    model = SEEN["model"]
    with client(Model(model.base_url, "guessed")) as api, pytest.raises(openai.AuthenticationError):
        api.models.list()
    with client(model) as api:
        assert [entry.id for entry in api.models.list()] == ["policy"]
        with pytest.raises(openai.NotFoundError):
            api.completions.create(model="m", prompt="x")
    assert model.api_key not in repr(model)
    runner.submit([Request(0, "close")])
    assert SEEN["ended"].wait(60)
    assert "the episode has ended" in SEEN["late"]
    with client(model) as api, pytest.raises(openai.AuthenticationError):
        api.models.list()


def test_agent_in_a_child_process() -> None:
    process = EpisodeProcess(sys.executable, f"{__name__}.Dialogue", {})
    try:
        replies = play(process, scripted("yes", "2"), {"prompt": "Begin."})
        assert replies[-1].value["reward"] == 2
    finally:
        process.shutdown()
