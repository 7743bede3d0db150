"""The math environment: a completion is right when its answer equals the ground truth.

::

    rollout ──step(completions)──► MathEnvironment (Ray actor)
                                     1. extract the answers              linear, in this process
                                     2. same number, same spelling       "
                                     3. verdicts seen before             "
                                     4. all the rest ──► VerifyPool ──► math_verifier processes, killed when they hang
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np

from nemo_rl.environments.answers import compare_cheaply, extract_answer, normalise, rational_literal, to_latex
from nemo_rl.environments.config import MathEnvironmentConfig
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn, SampleStatus
from nemo_rl.environments.verify_pool import Question, Verdict, VerifyPool
from nemo_rl.errors import EnvironmentFailure
from nemo_rl.utils.config import validate

GROUND_TRUTH = "ground_truth"

_MAX_REMEMBERED = 100_000
_MAX_FAILURES_SHOWN = 5


class MathEnvironment(EnvironmentInterface):
    """Judges answers to mathematical problems with one turn. A Ray actor class; thread-safe.

    `metadata[i]["ground_truth"]` is the expected answer: text (LaTeX or plain, without `\\boxed{}`) or a number.
    Rewards are 1 (right) or 0 (wrong, time-out, no answer).
    """

    def __init__(self, config: MathEnvironmentConfig | Mapping[str, Any] | None = None) -> None:
        """Raises `ConfigError` when a mapping is not a valid `env.math` section."""
        if not isinstance(config, MathEnvironmentConfig):
            config = validate(MathEnvironmentConfig, dict(config or {}), where="env.math")
        self._config = config
        self._pool = VerifyPool(config.num_workers, config.timeout_s, config.memory_limit_mb)
        self._verdicts = _Memory()

    def step(self, completions: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> EnvironmentReturn:
        """See `EnvironmentInterface.step`. A ground truth that cannot be read is an `EnvironmentFailure`, always."""
        self._pool.ensure_open()
        if len(completions) != len(metadata):
            raise EnvironmentFailure(f"{len(completions)} completions, but metadata for {len(metadata)}")
        truths = [self._truth(index, record) for index, record in enumerate(metadata)]
        batch = len(completions)
        answers: list[str | None] = [None] * batch
        status: list[SampleStatus] = ["unparseable"] * batch
        rewards = np.zeros(batch, dtype=np.float32)
        latency_s = np.zeros(batch, dtype=np.float64)
        undecided: dict[int, Question] = {}
        for index, (completion, truth) in enumerate(zip(completions, truths, strict=True)):
            started = time.perf_counter()
            answers[index] = answer = extract_answer(completion, self._config.answer_format)
            if answer is not None and len(answer) <= self._config.max_answer_chars:
                plain = normalise(answer)
                same = compare_cheaply(plain, truth)
                if same is None:
                    undecided[index] = Question(to_latex(truth), to_latex(plain))
                else:
                    status[index], rewards[index] = "ok", same
            latency_s[index] = time.perf_counter() - started
        self._check_truths(truths)
        for index, verdict in self._verify(undecided).items():
            latency_s[index] += verdict.elapsed_s
            rewards[index] = verdict.outcome == "equal"
            if verdict.outcome in ("equal", "different"):
                status[index] = "ok"
            elif verdict.outcome == "timeout":
                status[index] = "timeout"
        return EnvironmentReturn(rewards, np.ones(batch, dtype=np.bool_), answers, status, latency_s)

    def global_post_process_and_metrics(self, result: EnvironmentReturn) -> tuple[EnvironmentReturn, dict[str, float]]:
        """Metrics: accuracy, fraction_timeout, fraction_unparseable, verify_latency_s (mean per answer)."""
        if result.size == 0:
            return result, {}
        return result, {
            "accuracy": float(np.mean(result.rewards == 1.0)),
            "fraction_timeout": result.status.count("timeout") / result.size,
            "fraction_unparseable": result.status.count("unparseable") / result.size,
            "verify_latency_s": float(np.mean(result.latency_s)),
        }

    def shutdown(self) -> None:
        """Kill the verify processes."""
        self._pool.close()

    def _truth(self, index: int, record: Mapping[str, object]) -> str:
        truth = record.get(GROUND_TRUTH)
        if isinstance(truth, bool) or not isinstance(truth, (str, int, float)):
            raise EnvironmentFailure(
                f"sample {index}: metadata[{GROUND_TRUTH!r}] must be text or a number, not {truth!r}; "
                f"keys there: {', '.join(map(str, record)) or 'none'}"
            )
        plain = normalise(str(truth))
        if not plain or len(plain) > self._config.max_answer_chars:
            raise EnvironmentFailure(
                f"sample {index}: the ground truth has {len(plain)} characters; "
                f"1 to {self._config.max_answer_chars} (env.math.max_answer_chars) are accepted"
            )
        return plain

    def _check_truths(self, truths: Sequence[str]) -> None:
        """Whether a sample fails must not depend on what the model wrote: every truth is read, once."""
        wanted = {index: Question(to_latex(t)) for index, t in enumerate(truths) if rational_literal(t) is None}
        broken = [(index, v.outcome) for index, v in self._verify(wanted).items() if v.outcome != "parsed"]
        if broken:
            shown = "; ".join(f"sample {i}: {truths[i][:200]!r} ({why})" for i, why in broken[:_MAX_FAILURES_SHOWN])
            raise EnvironmentFailure(
                f"{len(broken)} of {len(truths)} ground truths cannot be read, or compared in time, by math-verify: "
                f"{shown}. Correct or drop these records of the data set."
            )

    def _verify(self, questions: Mapping[int, Question]) -> dict[int, Verdict]:
        """Ask the pool each distinct question once; verdicts of earlier steps cost nothing."""
        distinct = dict.fromkeys(questions.values())
        known = self._verdicts.recall(distinct)
        new = [question for question in distinct if question not in known]
        if new:
            answered = dict(zip(new, self._pool.ask(new), strict=True))
            self._verdicts.store(answered)
            known |= answered
        return {index: known[question] for index, question in questions.items()}


class _Memory:
    """Verdicts by question, the most recently used first to stay. Thread-safe."""

    def __init__(self) -> None:
        self._verdicts: OrderedDict[Question, Verdict] = OrderedDict()
        self._lock = Lock()

    def recall(self, questions: Mapping[Question, None]) -> dict[Question, Verdict]:
        """What is known about the questions; a remembered verdict costs no time."""
        found = {}
        with self._lock:
            for question in questions:
                if question in self._verdicts:
                    self._verdicts.move_to_end(question)
                    found[question] = Verdict(self._verdicts[question].outcome, 0.0)
        return found

    def store(self, verdicts: Mapping[Question, Verdict]) -> None:
        """Remember verdicts and forget the oldest beyond the bound."""
        with self._lock:
            self._verdicts.update(verdicts)
            while len(self._verdicts) > _MAX_REMEMBERED:
                self._verdicts.popitem(last=False)
