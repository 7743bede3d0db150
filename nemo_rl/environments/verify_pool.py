"""A pool of `math_verifier` processes. Hostile answers may hang or crash a process, which is then replaced.

::

    caller threads ──verify()──► executor (num_workers threads) ──one slot each──► process ══pipe══► math_verifier
                                        │                                             │
                                        └── waits at most: CPU budget, wall limit ────┘── kill and replace

Causes and outcomes:

* The process used up its CPU budget: the answer is the cause ("timeout").
* The process crashed or ran out of memory. Earlier answers may be the cause, so the answer is retried in a new process
  that has passed a self-test. If that crashes, too, the answer is the cause ("unparseable").
* Another process killed it, it got no CPU time for very long, or it cannot be started: the infrastructure is the
  cause. After bounded retries this raises `EnvironmentFailure`; it is never a result.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import psutil

import nemo_rl
from nemo_rl import settings
from nemo_rl.errors import EnvironmentFailure

logger = logging.getLogger(__name__)

# Final outcomes of a request. Any other result leads to a retry.
Outcome = Literal["equal", "different", "unparseable", "timeout", "parsed"]

_START_TIMEOUT_S = 120.0
_MAX_STARTS = 3
_MAX_CRASHES = 2
_MAX_FAILURES = 3
_SIGNALS_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# A process that waits this many times its CPU budget without computing is starved by the machine, not by the answer.
_STARVATION_FACTOR = 30.0
# sympy caches expressions; a process is replaced before the caches reach its memory limit.
_MAX_REQUESTS_PER_PROCESS = 2000
# Environment variables that a verify process inherits: enough to start Python, no secrets.
_INHERITED_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "PYTHONDONTWRITEBYTECODE", "TMPDIR", "VIRTUAL_ENV")


@dataclass(frozen=True)
class VerifyRequest:
    """Requests to compare `answer` with `truth`, or, with `answer` None, to check that `truth` can be compared."""

    truth: str
    answer: str | None = None


@dataclass(frozen=True)
class VerifyResult:
    """The outcome of one request, and the seconds it took, without the time in the queue."""

    outcome: Outcome
    elapsed_s: float


class _ProcessDied(Exception):
    """The process ended before it replied.

    Attributes:
        result: "timeout" if its CPU limit ended it, "crashed" if it ended by itself, "was killed" if another process
            killed it. (A memory limit makes allocations fail, so the process itself never causes a SIGKILL.)
    """

    def __init__(self, exit_status: int) -> None:
        super().__init__(exit_status)
        self.result = "crashed"
        if exit_status == -signal.SIGXCPU:
            self.result = "timeout"
        elif -exit_status in _SIGNALS_FROM_OUTSIDE:
            self.result = "was killed"


class _BudgetSpent(Exception):
    """The process has used up its CPU budget."""


class _Starved(Exception):
    """The process did not get its CPU budget within the wall-clock limit."""


class _VerifyProcess:
    """One verify process. One thread uses it at a time. The constructor raises `EnvironmentFailure`."""

    def __init__(self, timeout_s: float, memory_limit_mb: int) -> None:
        self._timeout_s = timeout_s
        self._num_requests = 0
        root = str(Path(nemo_rl.__file__).resolve().parent.parent)
        environment = {k: v for k, v in settings.snapshot().items() if k in _INHERITED_VARIABLES}
        command = [sys.executable, "-P", "-s", "-m", "nemo_rl.environments.math_verifier"]
        with tempfile.TemporaryFile() as errors:
            try:
                # A new session: Ctrl-C reaches the driver, which ends its actors, which end their verify processes.
                self._process = subprocess.Popen(
                    [*command, str(timeout_s), str(memory_limit_mb)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env={**environment, "PYTHONPATH": root},
                    start_new_session=True,
                )
            except OSError as error:
                raise EnvironmentFailure(f"cannot start a verify process with {sys.executable}: {error}") from error
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._requests, self._replies = self._process.stdin, self._process.stdout
            try:
                reply = self._receive(time.monotonic() + _START_TIMEOUT_S, cpu_budget_s=None)
            except (_ProcessDied, _Starved):
                self.kill()
                errors.seek(0)
                tail = errors.read().decode(errors="replace").strip()[-2000:] or "it wrote nothing"
                raise EnvironmentFailure(
                    f"the verify process did not start (exit status {self._process.returncode}): {tail}"
                ) from None
        assert reply == "ready"

    def verify(self, request: VerifyRequest) -> str:
        """Send a request and wait for the result. Raises `_ProcessDied`, `_BudgetSpent` or `_Starved`."""
        self._num_requests += 1
        message = {"op": "check", "truth": request.truth}
        if request.answer is not None:
            message = {"op": "verify", "truth": request.truth, "answer": request.answer}
        try:
            self._requests.write(json.dumps(message).encode() + b"\n")
            self._requests.flush()
        except OSError:
            raise self._death() from None
        return self._receive(time.monotonic() + _STARVATION_FACTOR * self._timeout_s, self._timeout_s)

    @property
    def worn_out(self) -> bool:
        """Whether the process has served its maximum number of requests."""
        return self._num_requests >= _MAX_REQUESTS_PER_PROCESS

    def kill(self) -> None:
        """Kill the process and reap it."""
        self._process.kill()
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.wait()

    def _receive(self, wall_deadline: float, cpu_budget_s: float | None) -> str:
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        cpu_deadline = None if cpu_budget_s is None else self._cpu_s() + cpu_budget_s
        while True:
            left = wall_deadline - time.monotonic()
            if left <= 0:
                raise _Starved
            if cpu_deadline is not None:
                cpu_left = cpu_deadline - self._cpu_s()
                if cpu_left <= 0:
                    raise _BudgetSpent
                left = min(left, cpu_left)
            if poll.poll(max(10.0, 1000 * left)):
                break
        line = self._replies.readline()
        if not line.endswith(b"\n"):
            raise self._death()
        result: str = json.loads(line)["result"]
        return result

    def _cpu_s(self) -> float:
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.NoSuchProcess:
            raise self._death() from None
        return float(times.user + times.system)

    def _death(self) -> _ProcessDied:
        # The pipe closes shortly before the process can be reaped.
        try:
            return _ProcessDied(self._process.wait(timeout=_START_TIMEOUT_S))
        except subprocess.TimeoutExpired:
            return _ProcessDied(-signal.SIGKILL)


class VerifyPool:
    """Verifies answers in parallel. Thread-safe; processes start with the first request that needs them.

    Example:

        pool = VerifyPool(num_workers=2, timeout_s=5.0, memory_limit_mb=2048)
        [result] = pool.verify([VerifyRequest(truth="1/2", answer="0.5")])
        print(result.outcome)  # equal
        pool.close()

    Args:
        num_workers: Most processes at a time.
        timeout_s: CPU time of one request, in seconds.
        memory_limit_mb: Address space that one process may add, in MiB.
    """

    def __init__(self, num_workers: int, timeout_s: float, memory_limit_mb: int) -> None:
        self._timeout_s = timeout_s
        self._memory_limit_mb = memory_limit_mb
        self._executor = ThreadPoolExecutor(num_workers, thread_name_prefix="verify")
        # One slot per thread of the executor, so taking a slot never waits. The slot returned last is taken first.
        self._slots: queue.LifoQueue[_VerifyProcess | None] = queue.LifoQueue()
        for _ in range(num_workers):
            self._slots.put(None)
        self._num_workers = num_workers
        self._closed = False

    def verify(self, requests: Sequence[VerifyRequest]) -> list[VerifyResult]:
        """Return the results in the order of the requests. Raises `EnvironmentFailure`."""
        self.ensure_open()
        return list(self._executor.map(self._verify_one, requests))

    def ensure_open(self) -> None:
        """Raise `EnvironmentFailure` if the pool has been closed."""
        if self._closed:
            raise EnvironmentFailure("the environment has been shut down")

    def close(self) -> None:
        """Kill the processes and wait for running requests to end. Idempotent."""
        self._closed = True
        self._executor.shutdown(wait=True, cancel_futures=True)
        for _ in range(self._slots.qsize()):
            process = self._slots.get_nowait()
            if process is not None:
                process.kill()

    def _verify_one(self, request: VerifyRequest) -> VerifyResult:
        process = self._slots.get_nowait()
        started = time.monotonic()
        crashes = failures = 0
        try:
            while True:
                process = process or self._start_process()
                try:
                    result = process.verify(request)
                except _BudgetSpent:
                    result = "timeout"
                except _Starved:
                    result = "starved"
                except _ProcessDied as death:
                    result = death.result
                if result not in get_args(Outcome) or result == "timeout" or process.worn_out:
                    process.kill()
                    process = None
                if result in get_args(Outcome):
                    return VerifyResult(cast(Outcome, result), time.monotonic() - started)
                if result == "crashed":
                    crashes += 1
                    if crashes == _MAX_CRASHES:
                        return VerifyResult("unparseable", time.monotonic() - started)
                else:
                    failures += 1
                    logger.warning("A verify process %s and is replaced.", result)
                    if failures == _MAX_FAILURES:
                        raise EnvironmentFailure(self._explain_failure(result))
        finally:
            self._slots.put(process)

    def _start_process(self) -> _VerifyProcess:
        for attempt in range(1, _MAX_STARTS + 1):
            try:
                return _VerifyProcess(self._timeout_s, self._memory_limit_mb)
            except EnvironmentFailure as error:
                if attempt == _MAX_STARTS:
                    raise
                logger.warning("Start attempt %d of %d failed: %s", attempt, _MAX_STARTS, error)
                time.sleep(0.5 * attempt)
        raise AssertionError("unreachable")

    def _explain_failure(self, result: str) -> str:
        what = {
            "was killed": "killed from outside, probably because the machine ran out of memory: lower "
            f"env.math.memory_limit_mb ({self._memory_limit_mb}) or env.math.num_workers ({self._num_workers})",
            "starved": f"not given {self._timeout_s:g} s of CPU time within {_STARVATION_FACTOR * self._timeout_s:g} s:"
            f" the machine is overloaded; lower env.math.num_workers ({self._num_workers})",
        }[result]
        return f"an answer could not be scored: {_MAX_FAILURES} verify processes in a row were {what}"
