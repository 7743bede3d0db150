"""The token of the HTTP server: without it, any user of the machine could use the model."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_rl import settings
from nemo_rl.utils.files import private_temp_dir, write_atomically

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class AccessToken:
    """The token of one server.

    Attributes:
        value: The token.
        file: A file with the token that only this user can read. None: the user has chosen the token.
    """

    value: str = field(repr=False)
    file: Path | None

    @classmethod
    def for_port(cls, port: int) -> AccessToken:
        """Return the token that the user has set (`VLLM_API_KEY`), else generate one and write it to a file.

        The server listens on loopback, so its clients can read the file. A killed worker leaves it. It is then useless,
        and the next server on that port replaces it.

        Raises:
            OSError: the file cannot be written.
        """
        chosen = settings.VLLM_API_KEY.get()
        if chosen is not None:
            return cls(chosen, None)
        value = secrets.token_urlsafe(32)
        file = private_temp_dir() / f"http-{port}.token"
        write_atomically(file, value, private=True)
        return cls(value, file)

    def discard(self) -> None:
        """Remove the file."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


class TokenRequired:
    """Passes on to an ASGI application what carries the token; all else is answered here.

    vLLM's own check covers only some of its paths: `/invocations` and `/tokenize` need no token there.
    """

    def __init__(self, app: App, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            body = b"This server requires its token: send the header `Authorization: Bearer TOKEN`.\n"
            await send({"type": "http.response.body", "body": body})

    def _is_allowed(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        return len(values) == 1 and hmac.compare_digest(values[0], self._expected)
