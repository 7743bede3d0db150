"""The child's side of `episode_process`: serves an `EpisodeHost` over pipes. Python 3.10, standard library only.

A frame is a JSON object after its length in 4 bytes. The first one of each side starts the environment:
`{"name", "config", "concurrency", "search_path"}`, and `{"pid", "executable", "python", "venv_digest"}` or
`{"failure", "details"}`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import struct
import sys
import threading
import traceback
from dataclasses import asdict
from typing import IO, Any

from nemo_rl.distributed.workers.host import venv_digest
from nemo_rl.environments.episode_calls import Reply, Request
from nemo_rl.environments.episode_host import EpisodeHost

SHUTDOWN_S = 5.0  # for closing the episodes
_LENGTH = struct.Struct(">I")
_COLLECT_S = 3600.0


def encode(content: dict[str, Any]) -> bytes:
    """Return a frame. Raises `TypeError` or `ValueError` for what is not JSON data."""
    data = json.dumps(content).encode()
    return _LENGTH.pack(len(data)) + data


def receive(pipe: IO[bytes]) -> dict[str, Any] | None:
    """Return the next frame; None at the end of the pipe."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = pipe.read(length)
    return json.loads(data) if len(data) == length else None


def main() -> None:
    """Serve the parent until it closes the pipe, or ends."""
    # The pipes get other numbers: the environment's code, its libraries and children may use stdin and stdout.
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    def send(frame: bytes) -> None:
        with contextlib.suppress(OSError):  # the parent has ended
            sink.write(frame)
            sink.flush()

    start = receive(source)
    if start is None:
        return
    try:
        host = EpisodeHost(start["name"], start["config"], concurrency=start["concurrency"])
    except Exception as error:
        send(encode({"failure": f"{type(error).__name__}: {error}", "details": traceback.format_exc()}))
        return
    version, digest = platform.python_version(), venv_digest()
    send(encode({"pid": os.getpid(), "executable": sys.executable, "python": version, "venv_digest": digest}))

    def reply() -> None:
        while True:
            for answer in host.collect(_COLLECT_S):
                send(_encode_reply(start["name"], answer))

    threading.Thread(target=reply, name="replies", daemon=True).start()
    while (frame := receive(source)) is not None:
        host.submit([Request(**request) for request in frame["requests"]])
    closing = threading.Thread(target=host.shutdown, name="shutdown", daemon=True)
    closing.start()
    closing.join(SHUTDOWN_S)
    shutil.rmtree(start["search_path"], ignore_errors=True)
    sys.stdout.flush()
    os.killpg(0, signal.SIGKILL)  # with the processes that the environment started; the parent has made a session


def _encode_reply(name: str, reply: Reply) -> bytes:
    try:
        return encode({"replies": [asdict(reply)]})
    except (TypeError, ValueError) as error:
        failure = f"{name} returned something that is not JSON data: {error}"
        return encode({"replies": [asdict(Reply(reply.episode, None, reply.seconds, failure))]})


if __name__ == "__main__":
    main()
