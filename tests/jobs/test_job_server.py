"""Tests the client of Ray's job server without a server. `test_submission.py` tests it with a real one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType
from ray.job_submission import JobStatus

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

    def __init__(self, num_lost: int) -> None:
        self.num_lost = num_lost

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield "one\n"
        if self.num_lost > 0:
            raise ConnectionResetError
        yield "two\n"

    def get_job_info(self, job_id: str) -> JobDetails:
        self.num_lost -= 1
        if self.num_lost >= 0:
            raise requests.ConnectionError("refused")
        return JobDetails(type=JobType.SUBMISSION, submission_id=job_id, status=JobStatus.SUCCEEDED, entrypoint="x")

    def get_job_logs(self, job_id: str) -> str:
        return "one\ntwo\nthree\n"


@pytest.mark.parametrize("num_lost", [0, 3, 1000])
def test_log_survives_lost_connections(num_lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_rl.jobs.job_server._RECONNECT_PAUSE_S", 0.0)
    server = object.__new__(JobServer)
    server.address, server._client = "http://127.0.0.1:9", LosingClient(num_lost)
    output: list[str] = []
    if num_lost < 1000:
        assert server.follow("job", output.append).status == "SUCCEEDED"
        assert "".join(output) == "one\ntwo\nthree\n"
        return
    with pytest.raises(SubmissionError, match="the log of job cannot be followed: no Ray job server answers"):
        server.follow("job", output.append)
    assert "".join(output) == "one\n"
