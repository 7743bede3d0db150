"""Runs the package index of bench_broadcast: serves a folder at a limited rate and records the bytes that it sent.

python broadcast_registry.py FOLDER ADDRESS PORT BYTES_PER_SECOND COUNT_FILE
"""

from __future__ import annotations

import functools
import shutil
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

_BLOCK = 256 * 1024


class Uplink:
    """Limits the rate that all requests share."""

    def __init__(self, bytes_per_s: float, count_file: Path) -> None:
        self._bytes_per_s = bytes_per_s
        self._count_file = count_file
        self._sent = 0
        self._free_at = time.monotonic()
        self._lock = threading.Lock()

    def throttle(self, block: bytes) -> bytes:
        """Wait for as long as sending the block takes at the limited rate, and return the block."""
        with self._lock:
            self._sent += len(block)
            self._count_file.write_text(str(self._sent))
            self._free_at = max(self._free_at, time.monotonic()) + len(block) / self._bytes_per_s
            free_at = self._free_at
        time.sleep(max(0.0, free_at - time.monotonic()))
        return block


class Handler(SimpleHTTPRequestHandler):
    """Serves files through the uplink. Does not support ranges, like many mirrors."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: Any, uplink: Uplink, **options: Any) -> None:
        self._uplink = uplink
        super().__init__(*arguments, **options)

    def copyfile(self, source: Any, outputfile: Any) -> None:
        shutil.copyfileobj(_Limited(source, self._uplink), outputfile, _BLOCK)

    def log_message(self, *_: Any) -> None:
        pass


class _Limited:
    def __init__(self, source: IO[bytes], uplink: Uplink) -> None:
        self._source, self._uplink = source, uplink

    def read(self, size: int) -> bytes:
        return self._uplink.throttle(self._source.read(size))


if __name__ == "__main__":
    folder, address, port, rate, count_file = sys.argv[1:]
    handler = functools.partial(Handler, directory=folder, uplink=Uplink(float(rate), Path(count_file)))
    ThreadingHTTPServer((address, int(port)), handler).serve_forever()
