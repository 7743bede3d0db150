"""Plays a few episodes of an environment without a model, and reports what would disturb a training job.

::

    problem ──► two equal episodes ──► equal actions for both, until they end or `max_turns` ──► report
                 do they begin equally?    does `step` accept any text? is the reward finite? does it end?
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_rl.environments.episode_calls import EpisodeRunner, Reply, Request
from nemo_rl.environments.episode_host import opening_messages
from nemo_rl.errors import EnvironmentFailure

# (problem, conversation so far, number of the turn from 0) -> action
Policy = Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]], int], str]

Call = tuple[Literal["reset", "step"], Any]  # method and argument

# What a model may write, too.
_ODD_ACTIONS = (
    "",
    "\n",
    "I do not know.",
    "é 🙂 \\boxed{",
    '<tool_call>\n{"name": "none", "arguments": {}}\n</tool_call>',
)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_NOT_THE_AUTHORS = ("/nemo_rl/environments/episode_", "/nemo_rl/environments/agent_", "/lib/python3")
_MAX_SHOWN = 60


@dataclass
class PlayedEpisode:
    """Records one episode.

    Attributes:
        index: Position of its problem.
        problem: What `reset` received.
        messages: The conversation; the actions are messages of the role `assistant`.
        tools: JSON schemas of its tools.
        rewards: Reward of each turn.
        info: The last value of each name.
        end: Why it ended: `done`, `truncated` (by the environment), `max_turns`, `failed`, or `stopped` (by the check).
        failure: Why it failed; empty if it did not.
        reset_s, step_s: Seconds of the calls.
    """

    index: int
    problem: Mapping[str, Any]
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    info: dict[str, float] = field(default_factory=dict)
    end: str = ""
    failure: str = ""
    reset_s: float = 0.0
    step_s: list[float] = field(default_factory=list)

    @property
    def reward(self) -> float:
        """The sum over the turns."""
        return sum(self.rewards)

    def add(self, method: str, reply: Reply, max_turns: int) -> None:
        """Record what a call returned."""
        if reply.value is None:
            self.fail(_explained(reply, self.messages[-1]["content"] if method == "step" else None))
            return
        value = reply.value
        if method == "reset":
            self.reset_s = reply.seconds
            self.tools = value["tools"]
            self.messages += opening_messages(value["messages"], self.problem)
            if not self.messages:
                self.fail("reset returned no observation, and the problem has no prompt; return the first observation")
            self._check_texts()
            return
        self.step_s.append(reply.seconds)
        self.rewards.append(value["reward"])
        self.info |= value["info"]
        self.messages += value["messages"] or []
        if value["done"] or value["truncated"]:
            self.end = "done" if value["done"] else "truncated"
        elif len(self.rewards) == max_turns:
            self.end = "max_turns"
        self._check_texts()

    def _check_texts(self) -> None:
        for message in self.messages:
            # A list holds the parts of a message, a call of a tool has no text.
            if not isinstance(message["content"], str | list) and not message.get("tool_calls"):
                self.fail(f"an observation has the content {_shown(message['content'])}; return text")

    def fail(self, failure: str) -> None:
        """End the episode with a failure."""
        self.end, self.failure = "failed", failure


@dataclass(frozen=True)
class CheckReport:
    """Holds the result of `check_environment`.

    Attributes:
        episodes: The first of the two episodes of each problem.
        errors: What a job would fail on, one sentence each, with the fix.
        warnings: What is allowed, but probably not intended.
    """

    episodes: list[PlayedEpisode]
    errors: list[str]
    warnings: list[str]


def check_environment(
    runner: EpisodeRunner,
    problems: Sequence[Mapping[str, Any]],
    *,
    max_turns: int,
    timeout_s: float | None = None,
    policy: Policy | None = None,
) -> CheckReport:
    """Play two episodes of each problem with equal actions.

    Args:
        runner: The environment.
        problems: What `reset` receives. See `problem_record`.
        max_turns: Most actions of an episode.
        timeout_s: A round of calls, one for each episode, that takes longer is an error. None: no limit.
        policy: Chooses the actions. Default: `random_action`.

    Example:
        >>> from nemo_rl.environments.episode_host import EpisodeHost
        >>> host = EpisodeHost("operator.eq", {})
        >>> report = check_environment(host, [{"seed": 0, "prompt": "2 + 2", "answer": "4"}], max_turns=1)
        >>> report.errors, report.episodes[0].end
        ([], 'done')
        >>> host.shutdown()
    """
    policy = policy or random_action
    pairs = [(PlayedEpisode(index, p), PlayedEpisode(index, p)) for index, p in enumerate(problems)]
    everyone = [episode for pair in pairs for episode in pair]
    findings = _Findings()
    try:
        calls: dict[int, Call] = {number: ("reset", episode.problem) for number, episode in enumerate(everyone)}
        play_round(runner, everyone, calls, max_turns, timeout_s)
        for pair in pairs:
            _compare_beginnings(pair, findings)
        for turn in range(max_turns):
            calls = {}
            for number, (first, second) in enumerate(pairs):
                if not first.end and not second.end:
                    action = policy(first.problem, first.messages, turn)
                    calls |= {2 * number: ("step", action), 2 * number + 1: ("step", action)}
            if not calls:
                break
            play_round(runner, everyone, calls, max_turns, timeout_s)
            for number, pair in enumerate(pairs):
                if 2 * number in calls:
                    _compare_turns(pair, turn, findings)
        runner.submit([Request(number, "close") for number in range(len(everyone))])
    except EnvironmentFailure as error:
        findings.add("error", str(error))
    for episode in everyone:
        if episode.failure:
            findings.add("error", episode.failure, episode.index, key=episode.failure.partition(", for the action")[0])
    episodes = [first for first, _ in pairs]
    _check_ends(episodes, max_turns, findings)
    if len(episodes) > 1 and all(e.messages and e.messages[0] == episodes[0].messages[0] for e in episodes):
        findings.add(
            "warning",
            f"all {len(episodes)} problems begin with the same observation; unless that is intended, make the task "
            "from problem['seed'], or from the fields of the record",
        )
    return CheckReport(episodes, findings.of_kind("error"), findings.of_kind("warning"))


def play_round(
    runner: EpisodeRunner,
    episodes: Sequence[PlayedEpisode],
    calls: Mapping[int, Call],
    max_turns: int,
    timeout_s: float | None,
) -> None:
    """Make one call for each of some episodes at the same time, and record the replies.

    Args:
        episodes: Their positions are their ids for the environment.
        calls: Method and argument, by the position of the episode.

    Raises:
        EnvironmentFailure: The replies take longer than `timeout_s`, or the environment's process has ended.
    """
    requests = [Request(number, method, argument) for number, (method, argument) in calls.items()]
    waiting = {request.episode: request for request in requests}
    for request in requests:
        if request.method == "step":
            episodes[request.episode].messages.append({"role": "assistant", "content": request.argument})
    runner.submit(requests)
    deadline = time.monotonic() + (timeout_s or float("inf"))
    while waiting:
        for reply in runner.collect(max(0.0, min(deadline - time.monotonic(), 1.0))):
            request = waiting.pop(reply.episode)
            episodes[reply.episode].add(request.method, reply, max_turns)
        if waiting and time.monotonic() > deadline:
            request = next(iter(waiting.values()))
            shown = f" for the action {_shown(request.argument)}" if request.method == "step" else ""
            raise EnvironmentFailure(
                f"{request.method} took more than {timeout_s:g} s{shown}; raise step_timeout_s if it may take that long"
            )


def problem_record(prompt: Any, answer: str, index: int, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `reset` receives for a problem of a data set. The seed is its position unless it has one."""
    return {"seed": index, **metadata, "prompt": prompt, "answer": answer}


def random_action(problem: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], turn: int) -> str:
    """Return a word of the last observation, a number, the problem's answer, or an odd text. Follows from the seed."""
    chance = random.Random(f"{problem.get('seed')} {turn}")
    words = re.findall(r"[\w.-]+", str(messages[-1]["content"])) if messages else []
    kinds = [[str(chance.randint(0, 9))], list(_ODD_ACTIONS), words, [str(problem.get("answer") or "")]]
    return chance.choice(chance.choice([kind for kind in kinds if kind and kind != [""]]))


class _Findings:
    """Collects sentences with the problems that they concern. Of sentences with one key, the first is kept."""

    def __init__(self) -> None:
        self._sentences: dict[tuple[str, str], str] = {}
        self._problems: dict[tuple[str, str], set[int]] = {}

    def add(self, kind: Literal["error", "warning"], sentence: str, index: int | None = None, key: str = "") -> None:
        found = (kind, key or sentence)
        self._sentences.setdefault(found, sentence)
        self._problems.setdefault(found, set()).update([] if index is None else [index])

    def of_kind(self, kind: str) -> list[str]:
        return [f"{_where(self._problems[key])}{text}" for key, text in self._sentences.items() if key[0] == kind]


def _where(indices: set[int]) -> str:
    if not indices:
        return ""
    numbers = ", ".join(map(str, sorted(indices)))
    return f"problem{'s' if len(indices) > 1 else ''} {numbers}: "


def _compare_beginnings(pair: tuple[PlayedEpisode, PlayedEpisode], findings: _Findings) -> None:
    first, second = pair
    if first.failure or second.failure:
        return
    for what, one, other in (("observations", first.messages, second.messages), ("tools", first.tools, second.tools)):
        if one != other:
            findings.add(
                "error",
                f"two episodes of the same problem begin with different {what}: {_difference(one, other)}; draw all "
                "random numbers from random.Random(problem['seed']), and share no state between episodes",
                first.index,
                key=what,
            )


def _compare_turns(pair: tuple[PlayedEpisode, PlayedEpisode], turn: int, findings: _Findings) -> None:
    first, second = pair
    if first.failure or second.failure:
        return
    one = (first.rewards[-1], first.end, first.messages[-1]["content"])
    other = (second.rewards[-1], second.end, second.messages[-1]["content"])
    if one != other:
        findings.add(
            "warning",
            f"two episodes of the same problem differ after turn {turn + 1}, after equal actions; if the environment "
            "draws random numbers, take them from random.Random(problem['seed'])",
            first.index,
            key="turns",
        )
        first.end = first.end or "stopped"
        second.end = second.end or "stopped"


def _check_ends(episodes: Sequence[PlayedEpisode], max_turns: int, findings: _Findings) -> None:
    if episodes and all(episode.end == "max_turns" for episode in episodes):
        findings.add(
            "error",
            f"no episode ended within max_turns={max_turns} actions; return Turn(done=True) at the end, or raise "
            "max_turns",
        )


def _explained(reply: Reply, action: object) -> str:
    """Return the failure of a call as one sentence, with the line of the environment's code and the action."""
    sentence = " ".join(str(reply.failure).split())
    frames = _FRAME.findall(reply.details)
    frames = [frame for frame in frames if not any(part in frame[0] for part in _NOT_THE_AUTHORS)]
    if frames:
        sentence += " ({}:{})".format(*frames[-1])
    if action is not None:
        sentence += f", for the action {_shown(action)}"
        sentence += "; an action is any text, so return a Turn for each" if frames else ""
    return sentence


def _difference(one: Sequence[Any], other: Sequence[Any]) -> str:
    a, b = next(((a, b) for a, b in zip(one, other) if a != b), (f"{len(one)} items", f"{len(other)} items"))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        key = next((key for key in a if a[key] != b.get(key)), "role")
        a, b = a.get(key), b.get(key)
    return f"{_shown(a)} and {_shown(b)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
