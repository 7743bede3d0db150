"""A server with an OpenAI-compatible API, for tests of judges."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Status, content and further headers of an answer. The status 0 closes the connection without an answer.
Answer = tuple[int, Any, dict[str, str]]


def completion(text: str) -> Answer:
    """Return the answer of a language model that says `text`."""
    return 200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}, {}


def refusal(status: int, message: str = "busy") -> Answer:
    """Return an error, after which the client may try again at once."""
    return status, {"error": {"message": message}}, {"retry-after-ms": "1"}


class JudgeServer:
    """Answers each request with what `answer` returns for it, and keeps the requests with their keys."""

    def __init__(self, answer: Callable[[dict[str, Any]], Answer]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                assert self.path == "/v1/chat/completions"
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(request)
                server.authorizations.append(self.headers["Authorization"])
                status, content, headers = answer(request)
                if status == 0:
                    self.close_connection = True
                    return
                data = json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
