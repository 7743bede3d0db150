"""The calls of episodes: what the training loop sends to an environment, and what comes back.

Requests and replies are plain data, so they can cross a pipe to a process with another Python. The module needs nothing
but the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Request:
    """Asks for one call of one episode.

    Attributes:
        episode: Id of the episode, chosen by the caller. `reset` begins it, `close` ends it.
        method: The method to call.
        argument: The problem for `reset`, the action for `step`, None for `close`.
        usage: Of an action: `prompt_tokens` and `completion_tokens`, and whether it was cut off (`truncated`). Agents
            receive it. None if unknown.
    """

    episode: int
    method: Literal["reset", "step", "close"]
    argument: Any = None
    usage: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Reply:
    """Holds what a call of an episode returned, as plain data.

    Attributes:
        episode: Id of the episode.
        value: Of `reset`: `messages` (None: the problem's prompt) and `tools`. Of `step`: the fields of a `Turn`, with
            `messages` instead of `observation`; of an agent also `tools` and `continues` (see `agent.ModelCall`). None
            after a failure.
        seconds: Time that the call took, without the time in the queue.
        failure: Why the call failed, as one sentence; None if it did not.
        details: The traceback of the failure.
    """

    episode: int
    value: dict[str, Any] | None
    seconds: float
    failure: str | None = None
    details: str = ""


class EpisodeRunner(Protocol):
    """Runs the episodes of one environment: in this process (`EpisodeHost`) or in workers (`EnvironmentGroup`)."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue calls. Those of one episode run one after another, in the order of their requests."""

    def collect(self, timeout_s: float) -> list[Reply]:
        """Return the replies that are there; wait for the first one, at most `timeout_s` seconds.

        A failure of the environment is a reply. Raises `EnvironmentFailure` if no episode can run any more.
        """
