"""Builds several venvs in parallel, with one process per py_executable.

::

    command line ── fork ──► builder of BASE      (its own session; its uv process ends with it)
         ▲                     │ Progress, then Outcome
         │                     ▼
         └── events ────────── pipe

On Ctrl-C or SIGTERM the command line sends SIGINT to each builder. A builder removes its partial venv and releases its
lock; then the command line exits with 130. On SIGKILL of the command line, the kernel sends SIGINT to the builders.
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
    """Holds the result of one target: a venv or an error."""

    target: Target
    venv: SealedVenv | None = None
    error: NemoRLError | None = None
    seconds: float = 0.0


# Called with the name of a builder's first target and each of its events, and with None at least every `_POLL_S`.
OnEvent = Callable[[str, Progress | Outcome | None], None]


def build_all(targets: Sequence[Target], *, force: bool, jobs: int, on_event: OnEvent) -> list[Outcome]:
    """Build the venvs of all targets. Return one outcome per target, in order.

    Targets with the same py_executable share one build.

    Args:
        targets: venvs to build.
        force: rebuild existing venvs.
        jobs: maximum number of parallel builds.
        on_event: called with the events of the builders.

    Raises:
        KeyboardInterrupt: interrupted; all builders have ended and cleaned up.
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
    """Represents the process that builds one py_executable."""

    targets: list[Target]
    process: ForkProcess
    connection: Connection
    reported: int = 0
    ended: bool = False

    @staticmethod
    def start(targets: list[Target], force: bool, job_id: str) -> _Builder:
        context = multiprocessing.get_context("fork")  # this process is small and single-threaded
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_build, args=(targets, force, job_id, sender, os.getpid()))
        process.start()
        sender.close()
        return _Builder(targets, process, receiver)

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
    """Interrupt running builders and wait until they have cleaned up. A second Ctrl-C kills them."""
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
    """Run in the builder process: build the targets and send their outcomes."""
    os.setsid()  # only the command line receives Ctrl-C of the terminal, and sends it to the builders once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
    try:
        if os.getppid() != parent:
            return
        for target in targets:
            connection.send(_outcome(target, force, job_id, connection))
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)  # `ensure` has cleaned up; exit without a traceback


def _outcome(target: Target, force: bool, job_id: str, connection: Connection) -> Outcome:
    start = time.monotonic()
    try:
        venv = ensure(target.py_executable, target.name, force_rebuild=force, job_id=job_id, progress=connection.send)
    except NemoRLError as error:
        return Outcome(target, error=error, seconds=time.monotonic() - start)
    except BrokenPipeError:  # the command line has exited
        raise
    except OSError as error:
        failure = VenvBuildError(f"The venv {target.name!r} cannot be built on {socket.gethostname()}: {error}")
        return Outcome(target, error=failure, seconds=time.monotonic() - start)
    return Outcome(target, venv, seconds=time.monotonic() - start)
