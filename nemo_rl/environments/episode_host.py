"""Runs the episodes of one environment in this process, several at a time.

::

    submit(requests) ──► one thread per running episode, or one event loop for coroutines ──► collect() ──► replies
                                                                                             (those that have ended)

Requests and replies are plain data, so they can cross a pipe to a process with another Python. Like `episode`, the
module needs nothing but the standard library.

An environment is named as `package.module.name`. It is a class with `reset` and `step` (see `episode.Environment`), or
one with one turn: a function `score(completion, answer) -> float`, or a class that scores batches of completions (see
`interfaces.EnvironmentInterface`), of which all episodes share one object; or an agent, which drives the model by
itself (`agent.Agent`).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from nemo_rl.distributed.workers.host import load_object
from nemo_rl.environments.agent import Agent, ModelCall
from nemo_rl.environments.agent_endpoint import AgentEndpoint
from nemo_rl.environments.agent_episode import AgentEpisode
from nemo_rl.environments.episode import Environment, Message, Observation, Turn
from nemo_rl.environments.episode_calls import Reply, Request

_MAX_SHOWN = 200


class EpisodeHost:
    """Makes and calls the episodes of one environment. Thread-safe.

    Example:
        >>> host = EpisodeHost("operator.eq", {})
        >>> host.submit([Request(0, "reset", {"answer": "4"}), Request(0, "step", "4")])
        >>> replies = []
        >>> while len(replies) < 2:
        ...     replies += host.collect(timeout_s=10)
        >>> replies[-1].value["reward"]
        1.0
        >>> host.shutdown()

    Args:
        name: `package.module.name` of a class or of a scoring function.
        config: Keyword arguments of the class, or further ones of the function.
        concurrency: Most calls at a time.

    Raises:
        ImportError: There is no such class or function, or its module fails.
        TypeError: It is no environment.
    """

    def __init__(self, name: str, config: Mapping[str, Any], *, concurrency: int = 16) -> None:
        self.name = name
        self._make = episode_maker(name, config)
        self._threads = ThreadPoolExecutor(concurrency, "episodes")
        self._episodes: dict[int, _Episode] = {}
        self._replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue calls. Those of one episode run one after another, in the order of their requests."""
        with self._lock:
            for request in requests:
                episode = self._episodes.setdefault(request.episode, _Episode())
                episode.waiting.append(request)
                if not episode.is_running:
                    episode.is_running = True
                    self._threads.submit(self._serve, request.episode, episode)

    def collect(self, timeout_s: float) -> list[Reply]:
        """Return the replies that are there; wait for the first one, at most `timeout_s` seconds."""
        replies: list[Reply] = []
        with contextlib.suppress(queue.Empty):
            replies.append(self._replies.get(timeout=timeout_s))
            while True:
                replies.append(self._replies.get_nowait())
        return replies

    def shutdown(self) -> None:
        """Drop queued calls, close all episodes whose call has ended, and end the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            idle = [episode for episode in self._episodes.values() if not episode.is_running]
            self._episodes.clear()
        for episode in idle:
            with contextlib.suppress(Exception):
                self._close(episode)
        if isinstance(self._make, _BatchEpisodes | _AgentEpisodes):
            self._make.shutdown()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)

    def _serve(self, number: int, episode: _Episode) -> None:
        """Run the calls of one episode until none is waiting."""
        while True:
            with self._lock:
                if not episode.waiting:
                    episode.is_running = False
                    if episode.environment is None:
                        self._episodes.pop(number, None)
                    return
                request = episode.waiting.pop(0)
            started = time.perf_counter()
            try:
                value = self._call(episode, request)
            except Exception as error:
                seconds = time.perf_counter() - started
                method = "run" if isinstance(self._make, _AgentEpisodes) else request.method
                failure = f"{self.name}.{method} raised {type(error).__name__}: {error}"
                self._replies.put(Reply(number, None, seconds, failure, traceback.format_exc()))
            else:
                if request.method != "close":
                    self._replies.put(Reply(number, value, time.perf_counter() - started))

    def _call(self, episode: _Episode, request: Request) -> dict[str, Any] | None:
        if request.method == "close":
            self._close(episode)
            return None
        if request.method == "reset":
            self._close(episode)
            episode.environment = self._make()
            observation = self._result(episode.environment.reset(request.argument))
            if isinstance(observation, ModelCall):
                return _plain_call(observation)
            messages = None if observation is None else as_messages(observation, "reset")
            return {"messages": messages, "tools": list(self._result(episode.environment.tools()))}
        if episode.environment is None:
            raise RuntimeError("step was called before reset")
        if isinstance(episode.environment, AgentEpisode):
            return plain_turn(episode.environment.step(request.argument, request.usage))
        return plain_turn(self._result(episode.environment.step(request.argument)))

    def _close(self, episode: _Episode) -> None:
        if episode.environment is not None:
            environment, episode.environment = episode.environment, None
            self._result(environment.close())

    def _result(self, value: Any) -> Any:
        """Return the value of a method; run it in the event loop if it is a coroutine."""
        if not inspect.isawaitable(value):
            return value

        async def wait() -> Any:
            return await value

        return asyncio.run_coroutine_threadsafe(wait(), self._running_loop()).result()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="episodes: coroutines", daemon=True).start()
            return self._loop


@dataclass
class _Episode:
    """One episode: its object, between `reset` and `close`, and its calls that have not begun."""

    environment: Any = None
    waiting: list[Request] = field(default_factory=list)
    is_running: bool = False


class _Scoring(Environment):
    """An episode with one turn, whose action is scored by a function."""

    def __init__(self, score: Callable[..., Any], config: Mapping[str, Any]) -> None:
        self._score, self._config = score, config
        self._answer: Any = None

    def reset(self, problem: dict[str, Any]) -> None:
        self._answer = problem.get("answer")

    def step(self, action: str) -> Turn:
        return Turn(reward=float(self._score(action, self._answer, **self._config)), done=True)


class _BatchEpisodes:
    """Makes episodes with one turn of a class that scores batches, such as the math environment."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self.shutdown: Callable[[], None] = environment.shutdown

    def __call__(self) -> Environment:
        return _BatchEpisode(self._environment)


class _BatchEpisode(Environment):
    """A batch of one completion, with the same metadata as in `algorithms.rollouts`."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self._metadata: dict[str, Any] = {}

    def reset(self, problem: dict[str, Any]) -> None:
        self._metadata = {**problem, "ground_truth": problem.get("answer")}

    def step(self, action: str) -> Turn:
        result = self._environment.step([action], [self._metadata])
        status = result.status[0]
        return Turn(
            reward=float(result.rewards[0]),
            observation=None if result.observations is None else result.observations[0],
            done=bool(result.terminated[0]),
            info={f"fraction_{name}": float(status == name) for name in ("timeout", "unparseable")},
            answer=result.answers[0],
        )


class _AgentEpisodes:
    """Makes the episodes of an agent, which share an endpoint."""

    def __init__(self, make_agent: Callable[[], Agent]) -> None:
        self._make_agent = make_agent
        self._endpoint: AgentEndpoint | None = None
        self._lock = threading.Lock()

    def __call__(self) -> Environment:
        with self._lock:
            if self._endpoint is None:
                self._endpoint = AgentEndpoint()
        return AgentEpisode(self._make_agent(), self._endpoint)

    def shutdown(self) -> None:
        with self._lock:
            if self._endpoint is not None:
                self._endpoint.close()


def episode_maker(name: str, config: Mapping[str, Any]) -> Callable[[], Any]:
    """Return a function that makes the object of a new episode of the environment `name`. See `EpisodeHost`."""
    target = load_object(name)
    if isinstance(target, type):
        if hasattr(target, "global_post_process_and_metrics"):
            return _BatchEpisodes(target(**config))
        if issubclass(target, Agent):
            return _AgentEpisodes(lambda: target(**config))
        missing = [method for method in ("reset", "step") if not callable(getattr(target, method, None))]
        if missing:
            raise TypeError(f"{name} is no environment: it has no method {' and no method '.join(missing)}")
        if not issubclass(target, Environment):
            target = type(target.__name__, (target, Environment), {"__module__": target.__module__})
        return target.episode_factory(**config)
    if callable(target):
        return lambda: _Scoring(target, config)
    raise TypeError(f"{name} is a {type(target).__name__}; an environment is a class or a function")


def as_messages(observation: object, method: str) -> list[Message]:
    """Return an observation as chat messages; text becomes a message of the role `user`. Raises `TypeError`."""
    if isinstance(observation, str):
        return [{"role": "user", "content": observation}]
    messages = list(_messages(observation, method))
    if not messages:
        raise TypeError(f"{method} returned an empty list as its observation; return text or chat messages")
    return messages


def opening_messages(observation: Observation | None, problem: Mapping[str, Any]) -> list[Message]:
    """Return what the model reads first: the observation of `reset`, or the problem's prompt if there is none."""
    prompt = problem.get("prompt") if observation is None else observation
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if prompt else []
    return list(prompt or [])


def _messages(observation: object, method: str) -> Iterator[Message]:
    if not isinstance(observation, list):
        raise TypeError(f"{method} returned {_shown(observation)} as its observation; return text or chat messages")
    for message in observation:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise TypeError(f"{method} returned {_shown(message)} as a message; it needs the keys role and content")
        if message["role"] == "assistant":
            raise TypeError(f"{method} returned a message of the role assistant; only the model speaks in that role")
        yield dict(message)


def plain_turn(turn: object) -> dict[str, Any]:
    """Check what `step` returned, and return it as plain data. Raises `TypeError` or `ValueError`."""
    if not isinstance(turn, Turn):
        raise TypeError(f"step returned {_shown(turn)}; return a nemo_rl.environments.episode.Turn")
    reward = _number(turn.reward, "the reward")
    ended = bool(turn.done or turn.truncated)
    if turn.observation is None and not ended:
        raise TypeError("step returned a Turn without an observation that does not end the episode")
    if isinstance(turn.observation, ModelCall):
        read = _plain_call(turn.observation)
    else:
        read = {"messages": None if turn.observation is None else as_messages(turn.observation, "step")}
    return {
        "reward": reward,
        **read,
        "done": bool(turn.done),
        "truncated": bool(turn.truncated),
        "info": {str(name): _number(value, f"info[{name!r}]") for name, value in turn.info.items()},
        "answer": None if turn.answer is None else str(turn.answer),
    }


def _plain_call(call: ModelCall) -> dict[str, Any]:
    return {"messages": list(call.messages), "tools": list(call.tools), "continues": call.continues}


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{what} is {_shown(value)}; it must be a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{what} is {number}; it must be finite")
    return number


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
