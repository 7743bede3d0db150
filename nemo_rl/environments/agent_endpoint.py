"""An OpenAI-compatible API on loopback, for the agents of one process.

The handler of a request waits for what the owner of its session returns: the endpoint itself knows no model. The module
needs nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nemo_rl.environments.agent import Model
from nemo_rl.environments.agent_requests import (
    ChatRequest,
    Choice,
    RequestRefused,
    chat_chunks,
    chat_response,
    parse_request,
)

_LOOPBACK = "127.0.0.1"
_MAX_BODY_BYTES = 64 * 2**20

# Answers a request; may wait. Raises `RequestRefused`.
Answer = Callable[[ChatRequest], list[Choice]]


class AgentEndpoint:
    """Serves the API from its own threads, until `close`. Each session has a key; requests must carry it."""

    def __init__(self) -> None:
        self._sessions: dict[bytes, Answer] = {}
        endpoint = self

        class Handler(_Handler):
            answer_of = staticmethod(endpoint._answer_of)

        self._server = _Server((_LOOPBACK, 0), Handler)
        self.base_url = f"http://{_LOOPBACK}:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, name="agents: endpoint", daemon=True).start()

    def open_session(self, answer: Answer) -> Model:
        """Return a new key, whose requests `answer` will answer."""
        model = Model(self.base_url, secrets.token_urlsafe(24))
        self._sessions[_digest(f"Bearer {model.api_key}")] = answer
        return model

    def close_session(self, model: Model) -> None:
        """Make the key invalid. Requests that wait are for the session's owner to end."""
        self._sessions.pop(_digest(f"Bearer {model.api_key}"), None)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def _answer_of(self, authorization: str) -> Answer | None:
        return self._sessions.get(_digest(authorization))


def _digest(authorization: str) -> bytes:
    """Return the key of a session. The time that its lookup takes says nothing about the keys of others."""
    return hashlib.sha256(authorization.encode()).digest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # many agents may start at once

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: the client has closed the connection."""


class _Handler(BaseHTTPRequestHandler):
    """Serves one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    answer_of: Callable[[str], Answer | None]

    def do_GET(self) -> None:
        self._respond(self._models)

    def do_POST(self) -> None:
        self._respond(self._complete)

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log."""

    def _respond(self, serve: Callable[[Answer, bytes], None]) -> None:
        try:
            body = self._read_body()
            answer = self.answer_of(self.headers.get("Authorization", ""))
            if answer is None:
                raise RequestRefused("the key is not that of a running episode: send Model.api_key", 401)
            serve(answer, body)
        except RequestRefused as error:
            kind = "invalid_request_error" if error.status < 500 else "server_error"
            self._send_json({"error": {"message": str(error), "type": kind, "code": error.status}}, error.status)

    def _models(self, answer: Answer, body: bytes) -> None:
        if self.path.rstrip("/") != "/v1/models":
            raise RequestRefused(f"there is no GET {self.path}; this API has /v1/models", 404)
        model = {"id": Model.name, "object": "model", "created": 0, "owned_by": "nemo_rl"}
        self._send_json({"object": "list", "data": [model]})

    def _complete(self, answer: Answer, body: bytes) -> None:
        if self.path.rstrip("/") != "/v1/chat/completions":
            raise RequestRefused(f"there is no POST {self.path}; this API has /v1/chat/completions", 404)
        request = parse_request(body)
        choices = answer(request)
        response = chat_response(request, choices)
        if request.is_streamed:
            self._send_events(request, response)
        else:
            self._send_json(response)

    def _read_body(self) -> bytes:
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise RequestRefused("a body in chunks is not supported; send its Content-Length", 411)
        length = int(self.headers.get("Content-Length") or 0)
        if length > _MAX_BODY_BYTES:
            self.close_connection = True
            raise RequestRefused(f"the request has {length} bytes, more than {_MAX_BODY_BYTES}", 413)
        return self.rfile.read(length)

    def _send_json(self, content: Mapping[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send_events(self, request: ChatRequest, response: Mapping[str, Any]) -> None:
        events = [json.dumps(chunk) for chunk in chat_chunks(request, response)]
        data = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
