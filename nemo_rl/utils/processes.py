"""When processes started, whether they still run, and which program they run.

Not by the clock: `psutil` adds the start of the kernel to a process's age, which gives another time after each
correction of the clock, and is rounded to a second.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

_ZOMBIE = "Z"


@dataclass(frozen=True)
class ProcessIdentity:
    """A process of this machine, identified by id and start because ids are reused.

    Attributes:
        pid: process id.
        start_ticks: when the kernel started it, in clock ticks since boot.
    """

    pid: int
    start_ticks: int

    @staticmethod
    def of(pid: int) -> ProcessIdentity:
        """Identify a running process. Raises `OSError` if there is none with this id."""
        return ProcessIdentity(pid, _state_and_start(pid)[1])

    def is_running(self) -> bool:
        """Whether the process has not ended, even if its parent has not taken note of the end."""
        try:
            state, start_ticks = _state_and_start(self.pid)
        except OSError:
            return False
        return start_ticks == self.start_ticks and state != _ZOMBIE


def start_time(pid: int) -> float:
    """Return when the kernel started a process, in seconds of the epoch, to a hundredth of a second.

    Raises `OSError` if it has ended.
    """
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return boot + _state_and_start(pid)[1] / os.sysconf("SC_CLK_TCK")


def program_of(pid: int) -> str:
    """Return the first word of a process's command line; "" while it starts or ends, when it has no command line.

    Raises `OSError` if there is no process with this id.
    """
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return os.fsdecode(file.read().partition(b"\0")[0])


def _state_and_start(pid: int) -> tuple[str, int]:
    """Return the fields 3 (`state`) and 22 (`starttime`) of proc_pid_stat(5)."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    return fields[0], int(fields[19])
