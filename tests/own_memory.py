"""The memory of a script that sees a file of its own as /proc/meminfo: it is short when somebody says so."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

_FREE = re.compile(rb"(?m)^(MemFree|MemAvailable|Buffers|Cached|SReclaimable):( *)(\d+)")


def short_of_memory(meminfo: str) -> None:
    """Say that nothing is free."""
    content = Path(meminfo).read_bytes()
    _say(meminfo, _FREE.sub(lambda found: found[1] + b":" + found[2] + b"0" * len(found[3]), content))


def _say(meminfo: str, content: bytes) -> None:
    with open(meminfo, "r+b") as file:  # in place: what is mounted is this very file
        file.write(content)


class OwnMemory:
    """`use_up`, called in a worker, leaves no memory until that worker is dead. The driver must `watch`."""

    def __init__(self, meminfo: str, folder: str) -> None:
        self._meminfo = meminfo
        self._folder = folder

    def use_up(self, name: str, num_times: int) -> None:
        """Wait for Ray's memory monitor to kill this process, unless `name` has seen `num_times` deaths."""
        num_deaths = self.num_deaths(name)
        if num_deaths < num_times:
            Path(self._folder, f"{name}-{num_deaths}").write_text(str(os.getpid()))
            short_of_memory(self._meminfo)
            time.sleep(60)
            raise AssertionError("nobody ended this process")

    def num_deaths(self, name: str) -> int:
        """How often a process died that used the memory up under this name."""
        return len(list(Path(self._folder).glob(f"{name}-*")))

    def watch(self) -> None:
        """From now on give the memory back when who used it up is dead."""
        plenty = self._content()
        threading.Thread(target=self._watch, args=(plenty,), daemon=True).start()

    def _watch(self, plenty: bytes) -> None:
        while True:
            deaths = [path.read_text() for path in Path(self._folder).iterdir()]
            if self._content() != plenty and not any(Path("/proc", pid, "exe").exists() for pid in deaths if pid):
                _say(self._meminfo, plenty)
            time.sleep(0.005)

    def _content(self) -> bytes:
        return Path(self._meminfo).read_bytes()
