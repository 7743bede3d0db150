"""Build several venvs at once: one process per py_executable, so that Ctrl-C reaches each as it would a single one.

::

    command line ── fork ──► builder of BASE      (own session; uv below it dies with it)
         ▲                     │ Progress, then results or an error, over a pipe
         │                     ▼
         └── events ────────── pipe          Ctrl-C or SIGTERM here: SIGINT to each builder, which removes what it
                                             began and lets go of its lock; then this process ends with 130.
                                             SIGKILL here: the kernel sends the builders the same SIGINT.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

from nemo_rl.cli.targets import Target
from nemo_rl.errors import NemoRLError, VenvBuildError
from nemo_rl.venvs import Progress, SealedVenv, ensure

_POLL_S = 0.1
_STOP_TIMEOUT_S = 30.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """What became of one target: a venv or an error."""

    target: Target
    venv: SealedVenv | None = None
    error: NemoRLError | None = None
    seconds: float = 0.0


# Called with the name of a builder's first target, and what it reports; with None at least every `_POLL_S`.
OnEvent = Callable[[str, Progress | Outcome | None], None]


def build_all(targets: Sequence[Target], *, force: bool, jobs: int, on_event: OnEvent) -> list[Outcome]:
    """Make the venvs of all targets ready; one outcome per target, in their order.

    Targets with the same py_executable share a builder, and thereby the build.

    Raises:
        KeyboardInterrupt: interrupted; every builder has ended and cleaned up.
    """
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.py_executable, []).append(target)
    job_id = f"cli:{socket.gethostname()}:{os.getpid()}:{time.time():.3f}"
    pending = list(groups.values())
    running: dict[Connection, _Builder] = {}
    outcomes: dict[str, Outcome] = {}
    try:
        while pending or running:
            while pending and len(running) < jobs:
                builder = _Builder.start(pending.pop(0), force, job_id)
                running[builder.connection] = builder
            for connection in wait(list(running), timeout=_POLL_S):
                assert isinstance(connection, Connection)
                builder = running[connection]
                for event in builder.receive():
                    on_event(builder.targets[0].name, event)
                    if isinstance(event, Outcome):
                        outcomes[event.target.name] = event
                if builder.ended:
                    del running[connection]
            on_event("", None)
    finally:
        _stop(running.values())
    return [outcomes[target.name] for target in targets]


@dataclass
class _Builder:
    """The process that builds one py_executable, seen from here."""

    targets: list[Target]
    process: ForkProcess
    connection: Connection
    reported: int = 0
    ended: bool = False

    @staticmethod
    def start(targets: list[Target], force: bool, job_id: str) -> _Builder:
        context = multiprocessing.get_context("fork")  # nothing heavy is loaded and no thread runs in this process
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_build, args=(targets, force, job_id, there, os.getpid()))
        process.start()
        there.close()
        return _Builder(targets, process, here)

    def receive(self) -> Iterator[Progress | Outcome]:
        try:
            event = self.connection.recv()
        except EOFError:
            self.process.join()
            self.ended = True
            for target in self.targets[self.reported :]:
                yield Outcome(target, error=self._died(target))
            return
        self.reported += isinstance(event, Outcome)
        yield event

    def _died(self, target: Target) -> VenvBuildError:
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = ". The system may have run out of memory: try again with --jobs 1" if code == -signal.SIGKILL else ""
        return VenvBuildError(f"The process that built the venv {target.name!r} {how}{hint}.")


def _stop(builders: Iterable[_Builder]) -> None:
    """Interrupt what still runs and wait until it has cleaned up. A second Ctrl-C kills it."""
    alive = [builder.process for builder in builders if builder.process.is_alive()]
    try:
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, signal.SIGINT)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for process in alive:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in alive:
            if process.is_alive():
                process.kill()
                process.join()


def _build(targets: list[Target], force: bool, job_id: str, connection: Connection, parent: int) -> None:
    """The builder process."""
    os.setsid()  # the terminal's Ctrl-C goes to the command line alone, which passes it on once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
    try:
        if os.getppid() != parent:
            return
        for target in targets:
            connection.send(_outcome(target, force, job_id, connection))
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)  # `ensure` has cleaned up; nobody wants a traceback


def _outcome(target: Target, force: bool, job_id: str, connection: Connection) -> Outcome:
    start = time.monotonic()
    try:
        venv = ensure(target.py_executable, target.name, force_rebuild=force, job_id=job_id, progress=connection.send)
    except NemoRLError as error:
        return Outcome(target, error=error, seconds=time.monotonic() - start)
    except BrokenPipeError:  # the command line has ended
        raise
    except OSError as error:
        failure = VenvBuildError(f"The venv {target.name!r} cannot be built on {socket.gethostname()}: {error}")
        return Outcome(target, error=failure, seconds=time.monotonic() - start)
    return Outcome(target, venv, seconds=time.monotonic() - start)
