"""Client of Ray's job server: submits jobs, follows their logs, reports their states.

::

    sources ── zip archive ──────────┐
    py_modules ──────────────────────┼──► job server (HTTP, the head's dashboard port) ──► driver process on the head
    command, --env, --secret ────────┘         │
                                               └──► log, followed until the job ends; exit code
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_rl import settings
from nemo_rl.errors import ConfigError, SubmissionError
from nemo_rl.jobs.submission import Submission, Upload
from nemo_rl.secrets import mask_secrets

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
FINAL = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
INTERRUPTED = 130

_RAISED = re.compile(r"^[\w.]*(?:Error|Exception): (.+)$", re.MULTILINE)
_MAX_RECONNECTS = 10
_RECONNECT_PAUSE_S = 1.0


@dataclass(frozen=True)
class JobState:
    """Describes the state of a job on the server.

    Attributes:
        status: Ray's status, such as "RUNNING" or "SUCCEEDED".
        message: Ray's message, with secrets masked.
        started, ended: seconds since the epoch; None before.
        exit_code: exit code of the command; None until it exits, or if it was stopped.
    """

    job_id: str
    status: str
    message: str
    entrypoint: str
    started: float | None
    ended: float | None
    exit_code: int | None

    @property
    def is_final(self) -> bool:
        """Whether the job has ended."""
        return self.status in FINAL

    @property
    def code(self) -> int:
        """Exit code for a command that waited for the job: the job's exit code as a shell reports it."""
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED":
            return INTERRUPTED
        if self.exit_code is None or self.exit_code == 0:
            return 1
        return 128 - self.exit_code if self.exit_code < 0 else self.exit_code


class JobServer:
    """Talks to Ray's job server at `address` (`http://host:port`).

    Raises:
        ConfigError: the address is not a URL.
        SubmissionError: the server does not answer, refuses the token, or reports an error. All methods raise it.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address or settings.RAY_API_SERVER_ADDRESS.get() or DEFAULT_ADDRESS
        if not self.address.startswith(("http://", "https://")):
            raise ConfigError(
                f"{self.address!r} is not the address of a job server: expected http://host:port with the port of "
                "Ray's dashboard (8265)."
            )
        from ray.job_submission import JobSubmissionClient

        from nemo_rl.distributed.ray_private import hide_upload_notices

        hide_upload_notices()
        # In Ray, the environment variable overrides the argument.
        with self._explained(), settings.exported({settings.RAY_API_SERVER_ADDRESS.name: self.address}):
            self._client: JobSubmissionClient = JobSubmissionClient(self.address)

    def submit(self, submission: Submission, upload: Upload) -> str:
        """Upload the files and start the job; return its id. Ray skips files that the cluster already has."""
        job_id = submission.name or _new_id(submission.command)
        with self._explained(submitting=job_id):
            return self._client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=job_id,
                runtime_env=upload.runtime_env,
                metadata=upload.metadata,
            )

    def state(self, job_id: str) -> JobState:
        """Return the state of a job."""
        with self._explained(job_id):
            return _state(self._client.get_job_info(job_id))

    def jobs(self) -> list[JobState]:
        """Return the states of all submitted jobs, newest first."""
        with self._explained():
            states = [_state(job) for job in self._client.list_jobs() if job.submission_id]
        return sorted(states, key=lambda job: job.started or 0.0, reverse=True)

    def logs(self, job_id: str) -> str:
        """Return the log of a job so far."""
        with self._explained(job_id):
            return self._client.get_job_logs(job_id)

    def follow(self, job_id: str, on_text: Callable[[str], None]) -> JobState:
        """Pass the log to `on_text` until the job ends, without gaps or repetitions. Return the final state."""
        position = failures = 0  # characters of the log that were passed on; failed connections in a row
        while True:
            lost: BaseException | None = None
            try:
                position = asyncio.run(self._tail(job_id, position, on_text))
            except _TailBroken as broken:
                failures = 0 if broken.position > position else failures + 1
                position, lost = broken.position, broken.__cause__
            try:
                state = self.state(job_id)
                rest = self.logs(job_id)[position:] if state.is_final else ""
            except SubmissionError as error:  # the server may come back
                failures, lost = failures + (lost is None), error
            else:
                if rest:
                    on_text(rest)
                if state.is_final:
                    return state
            if failures > _MAX_RECONNECTS:
                raise SubmissionError(
                    f"the log of {job_id} cannot be followed: {lost} The job may still run: nemo-rl status {job_id}"
                ) from lost
            time.sleep(_RECONNECT_PAUSE_S)

    async def _tail(self, job_id: str, position: int, on_text: Callable[[str], None]) -> int:
        """Pass on the log from `position` until the server closes the connection; return the new position."""
        import aiohttp  # a dependency of Ray's client, whose errors are not all `OSError`

        seen = 0
        texts = aiter(self._client.tail_job_logs(job_id))
        while True:
            try:
                text = await anext(texts)
            except StopAsyncIteration:
                return position
            except (TimeoutError, OSError, RuntimeError, aiohttp.ClientError) as error:
                raise _TailBroken(position) from error
            new_text = text[max(0, position - seen) :]
            seen += len(text)
            if new_text:
                on_text(new_text)  # its errors (closed pipe, full disk) are not lost connections
                position = max(position, seen)

    def stop(self, job_id: str) -> bool:
        """Stop a job; return False if it has already ended."""
        with self._explained(job_id):
            return self._client.stop_job(job_id)

    @contextlib.contextmanager
    def _explained(self, job_id: str = "", *, submitting: str = "") -> Iterator[None]:
        """Convert errors of the client to `SubmissionError` or `ConfigError`, with the fix."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise SubmissionError(
                f"the job server at {self.address} refuses this user: {str(error).partition(chr(10))[0]} "
                "Set RAY_AUTH_MODE=token and set RAY_AUTH_TOKEN_PATH to a file with the cluster's token."
            ) from None
        except (ConnectionError, requests.RequestException) as error:
            raise SubmissionError(
                f"no Ray job server answers at {self.address}. Set its address with --address, or open a tunnel: "
                f"ssh -L 8265:127.0.0.1:8265 HEAD. ({str(error).partition(chr(10))[0]})"
            ) from None
        except (RuntimeError, ValueError) as error:
            text = mask_secrets(str(error))
            if "No available agent" in text:
                text += (
                    " Ray's agent on the head is not running. Another cluster may use its port (52365): see "
                    "dashboard_agent.log, and start the head with --dashboard-agent-listen-port."
                )
            if job_id and "does not exist" in text:
                raise ConfigError(f"there is no job {job_id!r} at {self.address}. See: nemo-rl status") from None
            if "already exists" in text and submitting:
                raise ConfigError(f"there is a job {submitting!r} at {self.address}: choose another --name.") from None
            if "Traceback" in text and (raised := _RAISED.findall(text)):
                text = raised[-1]  # drop the server's traceback
            raise SubmissionError(f"the job server at {self.address} answered: {text.strip()[-800:]}") from None


class _TailBroken(Exception):
    """The connection was lost after `position` characters of the log."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


def _state(job: JobDetails) -> JobState:
    return JobState(
        job_id=job.submission_id or "",
        status=str(job.status.value),
        message=mask_secrets(job.message or ""),
        entrypoint=mask_secrets(job.entrypoint or ""),
        started=job.start_time / 1000 if job.start_time else None,
        ended=job.end_time / 1000 if job.end_time else None,
        exit_code=job.driver_exit_code,
    )


def _new_id(command: Sequence[str]) -> str:
    scripts = [os.path.basename(word) for word in command if word.endswith(".py")] or [os.path.basename(command[0])]
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", scripts[0].removesuffix(".py"))[:40]
    return f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
