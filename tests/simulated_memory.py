"""Simulated memory for a script that sees a private file as /proc/meminfo, so that a test can make memory scarce."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

_FREE = re.compile(rb"(?m)^(MemFree|MemAvailable|Buffers|Cached|SReclaimable):( *)(\d+)")


def exhaust_memory(meminfo: str) -> None:
    """Set the free memory to zero."""
    content = Path(meminfo).read_bytes()
    _write(meminfo, _FREE.sub(lambda match: match[1] + b":" + match[2] + b"0" * len(match[3]), content))


def _write(meminfo: str, content: bytes) -> None:
    with open(meminfo, "r+b") as file:  # in place, because this inode is mounted
        file.write(content)


class SimulatedMemory:
    """Lets a worker exhaust the memory until it is killed. The driver must call `watch`."""

    def __init__(self, meminfo: str, folder: str) -> None:
        self._meminfo = meminfo
        self._folder = folder

    def use_up(self, name: str, num_times: int) -> None:
        """Wait until Ray's memory monitor kills this process, unless `name` has been killed `num_times` times."""
        num_deaths = self.num_deaths(name)
        if num_deaths < num_times:
            Path(self._folder, f"{name}-{num_deaths}").write_text(str(os.getpid()))
            exhaust_memory(self._meminfo)
            time.sleep(300)
            raise AssertionError("Ray did not kill this process")

    def num_deaths(self, name: str) -> int:
        """Return how many processes have died that used up the memory under this name."""
        return len(list(Path(self._folder).glob(f"{name}-*")))

    def watch(self) -> None:
        """From now on restore the memory when the process that used it up is dead."""
        initial = self._content()
        threading.Thread(target=self._watch, args=(initial,), daemon=True).start()

    def _watch(self, initial: bytes) -> None:
        while True:
            deaths = [path.read_text() for path in Path(self._folder).iterdir()]
            if self._content() != initial and not any(Path("/proc", pid, "exe").exists() for pid in deaths if pid):
                _write(self._meminfo, initial)
            time.sleep(0.005)

    def _content(self) -> bytes:
        return Path(self._meminfo).read_bytes()
