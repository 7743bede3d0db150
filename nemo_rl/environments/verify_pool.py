"""A pool of `math_verifier` processes that hostile answers may hang, crash or blow up without harm.

::

    caller threads ──verify()──► executor (num_workers threads) ──one slot each──► _Child ══pipe══► math_verifier
                                        │                                            │
                                        └── waits at most: CPU budget, wall limit ───┘── kill and replace

Who is to blame, and what follows:

* The child used up its CPU budget: the answer is at fault ("timeout").
* The child crashed or ran out of memory: earlier answers may have worn it down, so the answer gets a second chance in a
  fresh child, which passes a self-test first. If that breaks too the answer is at fault ("unparseable").
* The child was killed by another process, got no CPU time for very long, or cannot be started: the infrastructure is
  at fault; after bounded retries this is an `EnvironmentFailure`, never a verdict.
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

# What the verifier or the fate of its process may say. Anything else leads to another try.
Outcome = Literal["equal", "different", "unparseable", "timeout", "parsed"]

_START_TIMEOUT_S = 120.0
_MAX_STARTS = 3
_MAX_CRASHES = 2
_MAX_FAILURES = 3
_SIGNALS_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# A child that waits this many times its CPU budget without computing is starved by the machine, not by the answer.
_STARVATION_FACTOR = 30.0
# sympy caches what it sees; a child is retired before the caches reach its memory limit.
_MAX_REQUESTS_PER_CHILD = 2000
# What a verify process sees of this process's variables: enough to start Python, no secret.
_INHERITED_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "PYTHONDONTWRITEBYTECODE", "TMPDIR", "VIRTUAL_ENV")


@dataclass(frozen=True)
class Question:
    """Is `answer` the same as `truth`? With `answer` None: can answers be compared with `truth` at all?"""

    truth: str
    answer: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The outcome of one question, and the seconds it took, queueing excluded."""

    outcome: Outcome
    elapsed_s: float


class _ChildDied(Exception):
    """The child ended before it answered.

    Attributes:
        result: "timeout" when its CPU limit ended it, "crashed" when it broke by itself, "was killed" when another
            process did it: memory is bounded by failing allocations, so nothing in the child leads to a SIGKILL.
    """

    def __init__(self, exit_status: int) -> None:
        super().__init__(exit_status)
        self.result = "crashed"
        if exit_status == -signal.SIGXCPU:
            self.result = "timeout"
        elif -exit_status in _SIGNALS_FROM_OUTSIDE:
            self.result = "was killed"


class _BudgetSpent(Exception):
    """The child computed for longer than it may."""


class _Starved(Exception):
    """The child was not given the CPU time that it may use."""


class _Child:
    """One verify process. Owned by one thread at a time. The constructor raises `EnvironmentFailure`."""

    def __init__(self, timeout_s: float, memory_limit_mb: int) -> None:
        self._timeout_s = timeout_s
        self._num_requests = 0
        root = str(Path(nemo_rl.__file__).resolve().parent.parent)
        environment = {k: v for k, v in settings.snapshot().items() if k in _INHERITED_VARIABLES}
        command = [sys.executable, "-P", "-s", "-m", "nemo_rl.environments.math_verifier"]
        with tempfile.TemporaryFile() as errors:
            try:
                # A session of its own: Ctrl-C reaches the driver, which ends its actors, which end their children.
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
            except (_ChildDied, _Starved):
                self.kill()
                errors.seek(0)
                tail = errors.read().decode(errors="replace").strip()[-2000:] or "it wrote nothing"
                raise EnvironmentFailure(
                    f"the verify process did not start (exit status {self._process.returncode}): {tail}"
                ) from None
        assert reply == "ready"

    def ask(self, question: Question) -> str:
        """Send a question and wait for the result. Raises `_ChildDied`, `_BudgetSpent` or `_Starved`."""
        self._num_requests += 1
        request = {"op": "check", "truth": question.truth}
        if question.answer is not None:
            request = {"op": "verify", "truth": question.truth, "answer": question.answer}
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        except OSError:
            raise self._death() from None
        return self._receive(time.monotonic() + _STARVATION_FACTOR * self._timeout_s, self._timeout_s)

    @property
    def worn_out(self) -> bool:
        """Whether the child has served long enough."""
        return self._num_requests >= _MAX_REQUESTS_PER_CHILD

    def kill(self) -> None:
        """End the process, whatever it is doing, and reap it."""
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

    def _death(self) -> _ChildDied:
        # The pipe closes a moment before the process can be reaped.
        try:
            return _ChildDied(self._process.wait(timeout=_START_TIMEOUT_S))
        except subprocess.TimeoutExpired:
            return _ChildDied(-signal.SIGKILL)


class VerifyPool:
    """Answers questions in parallel. Thread-safe; processes start with the first question that needs them."""

    def __init__(self, num_workers: int, timeout_s: float, memory_limit_mb: int) -> None:
        self._timeout_s = timeout_s
        self._memory_limit_mb = memory_limit_mb
        self._executor = ThreadPoolExecutor(num_workers, thread_name_prefix="verify")
        # One slot per thread of the executor, so taking one never waits; the last one returned is taken first.
        self._slots: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(num_workers):
            self._slots.put(None)
        self._num_workers = num_workers
        self._closed = False

    def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """Verdicts in the order of the questions. Raises `EnvironmentFailure`."""
        self.ensure_open()
        return list(self._executor.map(self._answer, questions))

    def ensure_open(self) -> None:
        """Raise `EnvironmentFailure` once the pool has been closed."""
        if self._closed:
            raise EnvironmentFailure("the environment has been shut down")

    def close(self) -> None:
        """Kill the processes and wait for running questions to end. Idempotent."""
        self._closed = True
        self._executor.shutdown(wait=True, cancel_futures=True)
        for _ in range(self._slots.qsize()):
            child = self._slots.get_nowait()
            if child is not None:
                child.kill()

    def _answer(self, question: Question) -> Verdict:
        child = self._slots.get_nowait()
        started = time.monotonic()
        crashes = failures = 0
        try:
            while True:
                child = child or self._start_child()
                try:
                    result = child.ask(question)
                except _BudgetSpent:
                    result = "timeout"
                except _Starved:
                    result = "starved"
                except _ChildDied as death:
                    result = death.result
                if result not in get_args(Outcome) or result == "timeout" or child.worn_out:
                    child.kill()
                    child = None
                if result in get_args(Outcome):
                    return Verdict(cast(Outcome, result), time.monotonic() - started)
                if result == "crashed":
                    crashes += 1
                    if crashes == _MAX_CRASHES:
                        return Verdict("unparseable", time.monotonic() - started)
                else:
                    failures += 1
                    logger.warning("A verify process %s; it is replaced.", result)
                    if failures == _MAX_FAILURES:
                        raise EnvironmentFailure(self._explain_failure(result))
        finally:
            self._slots.put(child)

    def _start_child(self) -> _Child:
        for attempt in range(1, _MAX_STARTS + 1):
            try:
                return _Child(self._timeout_s, self._memory_limit_mb)
            except EnvironmentFailure as error:
                if attempt == _MAX_STARTS:
                    raise
                logger.warning("Start %d of %d: %s", attempt, _MAX_STARTS, error)
                time.sleep(0.5 * attempt)
        raise AssertionError("unreachable")

    def _explain_failure(self, result: str) -> str:
        what = {
            "was killed": "killed from outside, probably because the machine ran out of memory: lower "
            f"env.math.memory_limit_mb ({self._memory_limit_mb}) or env.math.num_workers ({self._num_workers})",
            "starved": f"not given {self._timeout_s:g} s of CPU time within {_STARVATION_FACTOR * self._timeout_s:g} s:"
            f" the machine is overloaded; lower env.math.num_workers ({self._num_workers})",
        }[result]
        return f"an answer could not be judged: {_MAX_FAILURES} verify processes in a row were {what}"
