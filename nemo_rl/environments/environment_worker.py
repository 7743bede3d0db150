"""The worker of an environment: a Ray actor that hosts episodes, or the parent of a process that does."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_rl.environments.episode_calls import Reply, Request
from nemo_rl.environments.episode_host import EpisodeHost
from nemo_rl.environments.episode_process import EpisodeProcess
from nemo_rl.errors import EnvironmentFailure
from nemo_rl.utils.parent_watch import exit_with_parent

_MEMORY_CHECK_S = 1.0


class EnvironmentWorker:
    """Runs the episodes of one environment. `EnvironmentGroup` starts it, in the environment's own Python.

    Its methods are called at the same time, from several threads.

    Args:
        name: `package.module.name` of the environment. See `EpisodeHost`.
        config: Keyword arguments of the environment.
        concurrency: Most calls at a time.
        child_python: Interpreter of a child process that runs the episodes; None to run them in this process.
        memory_limit_mb: Most memory, in MiB, that this process and its children may use; None for no limit.
    """

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        *,
        concurrency: int = 16,
        child_python: str | None = None,
        memory_limit_mb: int | None = None,
    ) -> None:
        exit_with_parent()
        self._name, self._config, self._concurrency = name, config, concurrency
        self._child_python = child_python
        self._memory_limit_mb = memory_limit_mb
        self._memory_checked_at = time.monotonic()
        self._runner: EpisodeHost | EpisodeProcess

    def open(self) -> None:
        """Import the environment. Called once, before the other methods.

        An error in the constructor would end this process, and Ray would print its stack.

        Raises:
            EnvironmentFailure: The environment needs more memory than the limit before its first episode, or the child
                process does not start.
            ImportError, TypeError: See `EpisodeHost`.
        """
        if self._child_python is None:
            self._runner = EpisodeHost(self._name, self._config, concurrency=self._concurrency)
        else:
            self._runner = EpisodeProcess(self._child_python, self._name, self._config, concurrency=self._concurrency)
        used = resident_mb(os.getpid())
        if self._memory_limit_mb is not None and used > self._memory_limit_mb:
            raise EnvironmentFailure(
                f"{self._name} uses {used:.0f} MiB before its first episode; "
                f"memory_limit_mb={self._memory_limit_mb} is too low"
            )

    def describe(self) -> dict[str, Any]:
        """Return the `description` of the child process that runs the episodes; empty without one."""
        return self._runner.description if isinstance(self._runner, EpisodeProcess) else {}

    def submit(self, requests: Sequence[Request]) -> None:
        """See `EpisodeHost.submit`."""
        self._runner.submit(requests)

    def collect(self, timeout_s: float) -> list[Reply]:
        """See `EpisodeHost.collect`.

        Raises:
            MemoryError: This process and its children use more memory than the limit. It must be restarted.
            EnvironmentFailure: The child process has ended.
        """
        end = time.monotonic() + timeout_s
        while True:
            self._check_memory()
            left = end - time.monotonic()
            replies = self._runner.collect(max(0.0, left if self._memory_limit_mb is None else min(left, 1.0)))
            if replies or time.monotonic() >= end:
                return replies

    def shutdown(self) -> None:
        """Close all episodes, and end the child process."""
        self._runner.shutdown()

    def _check_memory(self) -> None:
        now = time.monotonic()
        if self._memory_limit_mb is None or now < self._memory_checked_at + _MEMORY_CHECK_S:
            return
        self._memory_checked_at = now
        used = resident_mb(os.getpid())
        if used > self._memory_limit_mb:
            raise MemoryError(
                f"{self._name} used {used:.0f} MiB of memory with its child processes, more than "
                f"memory_limit_mb={self._memory_limit_mb}"
            )


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process and its descendants in MiB, without psutil, which its venv may lack."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                status = Path("/proc", entry, "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue  # it has ended
            parents[int(entry)] = int(status.rpartition(")")[2].split()[1])  # field 4 of proc(5), `ppid`
    family, pages = {pid}, 0
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    for member in family:
        try:
            pages += int(Path("/proc", str(member), "statm").read_text(encoding="utf-8").split()[1])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
