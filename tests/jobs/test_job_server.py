"""Tests the client of Ray's job server without a server. `test_submission.py` tests it with a real one."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import AsyncIterator

import aiohttp
import pytest
import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType
from ray.job_submission import JobStatus, JobSubmissionClient

from nemo_rl.errors import ConfigError, SubmissionError
from nemo_rl.jobs.job_server import JobServer, JobState


@pytest.mark.parametrize(
    ("status", "exit_code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", -9, 137), ("FAILED", None, 1), ("STOPPED", None, 130)],
)
def test_exit_code_is_that_of_the_command(status: str, exit_code: int | None, expected: int) -> None:
    assert JobState("j", status, "", "", None, None, exit_code).code == expected


def test_unreachable_server_error_names_the_option() -> None:
    with pytest.raises(SubmissionError, match="--address"):
        JobServer("http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="http://host:port"):
        JobServer("127.0.0.1:8265")


class LosingClient:
    """Loses the log connection and the next `num_lost` requests; then reports that the job has ended."""

    def __init__(self, num_lost: int, error: Exception) -> None:
        self.num_lost = num_lost
        self.error = error

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield "one\n"
        if self.num_lost > 0:
            raise self.error
        yield "two\n"

    def get_job_info(self, job_id: str) -> JobDetails:
        self.num_lost -= 1
        if self.num_lost >= 0:
            raise requests.ConnectionError("refused")
        return JobDetails(type=JobType.SUBMISSION, submission_id=job_id, status=JobStatus.SUCCEEDED, entrypoint="x")

    def get_job_logs(self, job_id: str) -> str:
        return "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        TimeoutError(),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError("half an answer"),
        aiohttp.ClientOSError(104, "reset"),
        aiohttp.InvalidURL("http://x"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("num_lost", [0, 3, 1000])
def test_log_survives_lost_connections(num_lost: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_rl.jobs.job_server._RECONNECT_PAUSE_S", 0.0)
    server = object.__new__(JobServer)
    server.address, server._client = "http://127.0.0.1:9", LosingClient(num_lost, error)
    output: list[str] = []
    if num_lost < 1000:
        assert server.follow("job", output.append).status == "SUCCEEDED"
        assert "".join(output) == "one\ntwo\nthree\n"
        return
    with pytest.raises(SubmissionError, match="the log of job cannot be followed: no Ray job server answers"):
        server.follow("job", output.append)
    assert "".join(output) == "one\n"


def test_server_that_accepts_and_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_rl.jobs.job_server._RECONNECT_PAUSE_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def close_all() -> None:
            with contextlib.suppress(OSError):
                while True:
                    listener.accept()[0].close()

        threading.Thread(target=close_all, daemon=True).start()
        client = object.__new__(JobSubmissionClient)  # its constructor asks the server for its version
        client._address, client._cookies, client._headers, client._verify = url, None, {}, True
        client._ssl_context, client._default_metadata = True, {}
        server = object.__new__(JobServer)
        server.address, server._client = url, client
        with pytest.raises(SubmissionError, match="the log of job cannot be followed"):
            server.follow("job", lambda text: None)
        listener.shutdown(socket.SHUT_RDWR)
