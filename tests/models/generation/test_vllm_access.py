"""The token of the vLLM backend's HTTP server. These tests do not need vLLM."""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.models.generation.vllm.access import AccessToken, TokenRequired

TOKEN = "s3cret-token"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return tmp_path


def answers(scope: dict[str, Any]) -> list[dict[str, Any]]:
    """Send one request to a guarded application; returns the messages to the client."""
    sent: list[dict[str, Any]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "reached"})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the body must not be read")

    asyncio.run(TokenRequired(application, TOKEN)(scope, receive, send))
    return sent


@pytest.mark.parametrize("path", ["/v1/completions", "/invocations", "/tokenize", "/metrics", "/health", "/"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Bearer s3cret-toke")],
        [(b"authorization", b"Bearer s3cret-token2")],
        [(b"authorization", TOKEN.encode())],
        [(b"authorization", b"Basic s3cret-token")],
        [(b"x-authorization", b"Bearer s3cret-token")],
        [(b"authorization", b"Bearer \xff\xfe")],
        [(b"authorization", b"Bearer wrong"), (b"authorization", b"Bearer s3cret-token")],
    ],
)
def test_request_without_the_token_is_rejected(path: str, method: str, headers: list) -> None:
    sent = answers({"type": "http", "path": path, "method": method, "headers": headers})
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 401


@pytest.mark.parametrize("name", [b"authorization", b"Authorization"])
def test_request_with_the_token_is_passed_on(name: bytes) -> None:
    headers = [(b"host", b"localhost"), (name, b"Bearer s3cret-token")]
    assert answers({"type": "http", "path": "/v1/models", "headers": headers}) == [{"type": "reached"}]
    assert answers({"type": "websocket", "path": "/v1/realtime", "headers": headers}) == [{"type": "reached"}]


def test_websocket_without_the_token_is_closed() -> None:
    [message] = answers({"type": "websocket", "path": "/v1/realtime", "headers": []})
    assert message["type"] == "websocket.close"


def test_start_and_end_of_the_server_need_no_token() -> None:
    assert answers({"type": "lifespan"}) == [{"type": "reached"}]


def test_generated_token_is_in_a_private_file(temporary: Path) -> None:
    umask = os.umask(0)
    try:
        token = AccessToken.for_port(8123)
    finally:
        os.umask(umask)
    assert token.file is not None
    assert token.file.read_text() == token.value
    assert len(token.value) >= 43  # 256 bits
    assert stat.S_IMODE(token.file.stat().st_mode) == 0o600
    assert temporary in token.file.parents
    assert token.value not in repr(token)
    token.discard()
    assert not token.file.exists()


def test_next_server_on_a_port_replaces_the_token_of_a_killed_one(temporary: Path) -> None:
    killed, following = AccessToken.for_port(8123), AccessToken.for_port(8123)
    assert killed.value != following.value
    assert following.file is not None
    assert following.file.read_text() == following.value
    assert [path.name for path in following.file.parent.iterdir()] == ["http-8123.token"]


def test_token_of_the_user_is_used_and_written_nowhere(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "mine")
    token = AccessToken.for_port(8123)
    assert (token.value, token.file) == ("mine", None)
    token.discard()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_directory_that_others_can_write_is_refused(temporary: Path, mode: int) -> None:
    directory = temporary / f"nemo_rl-{os.getuid()}"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(PermissionError, match="writable by other users"):
        AccessToken.for_port(8123)
    assert list(directory.iterdir()) == []


def test_link_in_place_of_the_directory_is_refused(temporary: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (temporary / f"nemo_rl-{os.getuid()}").symlink_to(elsewhere)
    with pytest.raises(PermissionError):
        AccessToken.for_port(8123)
    assert list(elsewhere.iterdir()) == []
