"""The math environment: a completion is correct if its answer equals the ground truth.

::

    rollout ──step(completions)──► MathEnvironment (Ray actor)
                                     1. extract the answers              linear, in this process
                                     2. equal numbers, equal spelling    "
                                     3. results of earlier requests      "
                                     4. all others ──► VerifyPool ──► math_verifier processes, killed if they hang
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np

from nemo_rl.environments.answers import (
    answer_key_fault,
    compare_cheaply,
    extract_answer,
    needs_algebra,
    normalise,
    to_latex,
)
from nemo_rl.environments.config import MathEnvironmentConfig
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn, SampleStatus
from nemo_rl.environments.verify_pool import VerifyPool, VerifyRequest, VerifyResult
from nemo_rl.errors import EnvironmentFailure
from nemo_rl.utils.config import validate

logger = logging.getLogger(__name__)

GROUND_TRUTH = "ground_truth"

_MAX_CACHED_RESULTS = 100_000
_MAX_FAILURES_SHOWN = 5


class MathEnvironment(EnvironmentInterface):
    """Scores answers to mathematical problems with one turn. A Ray actor class; thread-safe.

    `metadata[i]["ground_truth"]` is the expected answer: text (LaTeX, plain notation or words) or a finite number.
    Rewards are 1 (correct) or 0 (wrong, time-out, no answer).

    Example:

        environment = MathEnvironment()
        result = environment.step(["It is \\boxed{0.5}."], [{"ground_truth": "1/2"}])
        print(result.rewards)  # [1.]
        environment.shutdown()

    Raises:
        ConfigError: `config` is a mapping, but not a valid `env.math` section.
    """

    def __init__(self, config: MathEnvironmentConfig | Mapping[str, Any] | None = None) -> None:
        if not isinstance(config, MathEnvironmentConfig):
            config = validate(MathEnvironmentConfig, dict(config or {}), where="env.math")
        self._config = config
        self._pool = VerifyPool(config.num_workers, config.timeout_s, config.memory_limit_mb)
        self._results = _ResultCache()

    def step(self, completions: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> EnvironmentReturn:
        """See `EnvironmentInterface.step`. A broken ground truth always raises `EnvironmentFailure`."""
        self._pool.ensure_open()
        if len(completions) != len(metadata):
            raise EnvironmentFailure(f"{len(completions)} completions, but {len(metadata)} metadata records")
        truths = [self._truth(index, record) for index, record in enumerate(metadata)]
        _check_truths(truths)
        batch = len(completions)
        answers: list[str | None] = [None] * batch
        status: list[SampleStatus] = ["unparseable"] * batch
        rewards = np.zeros(batch, dtype=np.float32)
        latency_s = np.zeros(batch, dtype=np.float64)
        undecided: dict[int, VerifyRequest] = {}
        for index, (completion, truth) in enumerate(zip(completions, truths, strict=True)):
            started = time.perf_counter()
            answers[index] = answer = extract_answer(completion, self._config.answer_format)
            if answer is not None and len(answer) <= self._config.max_answer_chars:
                plain = normalise(answer)
                same = compare_cheaply(plain, truth)
                if same is None:
                    undecided[index] = VerifyRequest(to_latex(truth), to_latex(plain))
                else:
                    status[index], rewards[index] = "ok", same
            latency_s[index] = time.perf_counter() - started
        for index in self._slow_truths({i: r.truth for i, r in undecided.items() if needs_algebra(truths[i])}):
            logger.warning("the ground truth %r takes too long; only equal text is right", truths[index][:200])
            status[index] = "timeout"
            del undecided[index]
        for index, result in self._verify(undecided).items():
            latency_s[index] += result.elapsed_s
            rewards[index] = result.outcome == "equal"
            if result.outcome in ("equal", "different"):
                status[index] = "ok"
            elif result.outcome == "timeout":
                status[index] = "timeout"
        return EnvironmentReturn(rewards, np.ones(batch, dtype=np.bool_), answers, status, latency_s)

    def global_post_process_and_metrics(self, result: EnvironmentReturn) -> tuple[EnvironmentReturn, dict[str, float]]:
        """Compute the metrics accuracy, fraction_timeout, fraction_unparseable, verify_latency_s (mean per answer)."""
        if result.size == 0:
            return result, {}
        return result, {
            "accuracy": float(np.mean(result.rewards == 1.0)),
            "fraction_timeout": result.status.count("timeout") / result.size,
            "fraction_unparseable": result.status.count("unparseable") / result.size,
            "verify_latency_s": float(np.mean(result.latency_s)),
        }

    def prepare(self) -> None:
        """Start a verify process. If that fails, the first `step` that needs one raises the error."""
        with contextlib.suppress(EnvironmentFailure):
            self._pool.verify([VerifyRequest(truth="1", answer="2")])

    def shutdown(self) -> None:
        """Kill the verify processes."""
        self._pool.close()

    def _truth(self, index: int, record: Mapping[str, object]) -> str:
        truth = record.get(GROUND_TRUTH)
        if isinstance(truth, bool) or not isinstance(truth, (str, int, float)):
            raise EnvironmentFailure(
                f"sample {index}: metadata[{GROUND_TRUTH!r}] must be text or a number, not {truth!r}; "
                f"it has the keys: {', '.join(map(str, record)) or 'none'}"
            )
        if isinstance(truth, float) and not math.isfinite(truth):
            raise EnvironmentFailure(f"sample {index}: the ground truth must be a finite number, not {truth!r}")
        plain = normalise(str(truth))
        if not plain or len(plain) > self._config.max_answer_chars:
            raise EnvironmentFailure(
                f"sample {index}: the ground truth has {len(plain)} characters; "
                f"1 to {self._config.max_answer_chars} (env.math.max_answer_chars) are accepted"
            )
        return plain

    def _slow_truths(self, truths: Mapping[int, str]) -> list[int]:
        """Return the indices of truths that cannot be compared with anything in time. Each truth is tried once."""
        checks = self._verify({index: VerifyRequest(truth) for index, truth in truths.items()})
        return [index for index, result in checks.items() if result.outcome == "timeout"]

    def _verify(self, requests: Mapping[int, VerifyRequest]) -> dict[int, VerifyResult]:
        """Send each distinct request to the pool once; results of earlier steps come from the cache."""
        distinct = dict.fromkeys(requests.values())
        results = self._results.get(distinct)
        new = [request for request in distinct if request not in results]
        if new:
            new_results = dict(zip(new, self._pool.verify(new), strict=True))
            self._results.store(new_results)
            results |= new_results
        return {index: results[request] for index, request in requests.items()}


def _check_truths(truths: Sequence[str]) -> None:
    """Raise `EnvironmentFailure` for truths that are broken. The job has checked its data sets in the same way.

    A truth that math-verify cannot parse, or not in time, is no failure: only an answer of equal text is right.
    """
    broken = [(index, fault) for index, truth in enumerate(truths) if (fault := answer_key_fault(truth))]
    if broken:
        shown = "; ".join(f"sample {i}: {truths[i][:200]!r} ({why})" for i, why in broken[:_MAX_FAILURES_SHOWN])
        raise EnvironmentFailure(
            f"{len(broken)} of {len(truths)} ground truths cannot be compared with an answer: "
            f"{shown}. Correct or remove these records of the data set."
        )


class _ResultCache:
    """A thread-safe LRU cache of results by request."""

    def __init__(self) -> None:
        self._results: OrderedDict[VerifyRequest, VerifyResult] = OrderedDict()
        self._lock = Lock()

    def get(self, requests: Iterable[VerifyRequest]) -> dict[VerifyRequest, VerifyResult]:
        """Return the cached results of the requests. A cached result has taken no time."""
        cached = {}
        with self._lock:
            for request in requests:
                if request in self._results:
                    self._results.move_to_end(request)
                    cached[request] = VerifyResult(self._results[request].outcome, 0.0)
        return cached

    def store(self, results: Mapping[VerifyRequest, VerifyResult]) -> None:
        """Add results, and drop the least recently used ones beyond the limit."""
        with self._lock:
            self._results.update(results)
            while len(self._results) > _MAX_CACHED_RESULTS:
                self._results.popitem(last=False)
