"""Evaluates the weights of some training steps in a thread, while the training continues.

::

    training loop    step 10 ─► publish ─┐  step 11   step 12  ...   step 20 ─► publish ─┐  step 21  ...
                                         ▼                                               ▼
    thread                               evaluate step 10 ─► scores.json, eval/...       evaluate step 20 ─► ...

One evaluation runs at a time. If it is not finished when the next one is due, the newest weights wait, and older ones
that wait are skipped. So the training never waits, and at most three copies of the weights exist: those that are
evaluated, those that wait, and those that are published in their place.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nemo_rl.errors import NemoRLError, sentence

if TYPE_CHECKING:
    from nemo_rl.algorithms.eval_config import BackgroundEvaluationConfig
    from nemo_rl.algorithms.evaluation import ProblemScore
    from nemo_rl.jobs.eval_results import EvalResults
    from nemo_rl.models.weights.interfaces import WeightUpdate

logger = logging.getLogger(__name__)

_NEWS_S = 30.0  # between two messages while the training has ended and an evaluation runs


class BackgroundEvaluation:
    """Decides which weights are evaluated, evaluates them, and records scores, skipped steps and failures.

    An evaluation that fails is recorded, and never ends the training.

    Example::

        evaluation = BackgroundEvaluation(config, results, publish=publish, evaluate=evaluate, log_metrics=log_metrics)
        evaluation.offer(10)  # returns when the weights of step 10 are published
        evaluation.finish(10)
        evaluation.stop()

    Args:
        config: when weights are evaluated.
        results: receives the scores. Only this object writes to it.
        publish: publishes the policy's weights as those of a step. Called in the thread of `offer`.
        evaluate: evaluates published weights; returns what `EvalResults.add` accepts. Called in the thread.
        log_metrics: receives the metrics `eval/...` of a step. Called in the thread.
    """

    def __init__(
        self,
        config: BackgroundEvaluationConfig,
        results: EvalResults,
        *,
        publish: Callable[[int], WeightUpdate],
        evaluate: Callable[[int, WeightUpdate], tuple[dict[str, Any], list[ProblemScore]]],
        log_metrics: Callable[[int, dict[str, float]], None],
    ) -> None:
        self._config = config
        self._results = results
        self._publish = publish
        self._evaluate = evaluate
        self._log_metrics = log_metrics
        # Guards the fields below and the results.
        self._changed = threading.Condition(threading.RLock())
        self._waiting: tuple[int, WeightUpdate] | None = None
        self._running: int | None = None
        self._failed: dict[int, str] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="evaluation", daemon=True)
        self._thread.start()

    def offer(self, step: int) -> None:
        """Evaluate the weights after `step` steps, which the policy has now, if they are due and not yet evaluated."""
        if self._config.is_due(step):
            self._submit(step)

    def finish(self, step: int) -> None:
        """Evaluate the weights of the last step if configured, wait for all evaluations, and report failures.

        The log says how long it has waited.
        """
        if self._config.at_end or self._config.is_due(step):
            self._submit(step)
        started, news_s = time.monotonic(), 0.0
        with self._changed:
            while not self._changed.wait_for(lambda: not self._pending(), news_s):
                steps = " and ".join(map(str, self._pending()))
                logger.info("waiting for the evaluation of step %s: %.0f s so far", steps, time.monotonic() - started)
                news_s = _NEWS_S
        if self._failed:
            first, reason = next(iter(self._failed.items()))
            steps = ", ".join(map(str, self._failed))
            logger.error("evaluations in the background have failed: steps %s. Step %d: %s", steps, first, reason)

    def stop(self) -> None:
        """Drop weights that wait. An evaluation that runs ends with the error that it gets when its workers end."""
        with self._changed:
            self._stopped, self._waiting = True, None
            self._changed.notify_all()

    def join(self, timeout_s: float = 30.0) -> None:
        """Wait until the thread has ended, after `stop`."""
        self._thread.join(timeout_s)

    def _submit(self, step: int) -> None:
        with self._changed:
            if step in self._results.steps or step in self._pending():
                return
            skipped = None if self._waiting is None else self._waiting[0]
            self._waiting = None  # frees its memory before more is published
        if skipped is not None:
            logger.warning(
                "the evaluation of step %d is skipped: an earlier one still runs, and step %d is due; raise "
                "eval.period, or give eval.cluster more workers",
                *(skipped, step),
            )
            self._leave_out(skipped, "skipped: an earlier evaluation was still running when the next one was due")
        try:
            update = self._publish(step)
        except Exception as error:  # the training may continue without it; if not, its next step raises, too
            self._record_failure(step, error)
            return
        with self._changed:
            self._waiting = (step, update)
            self._changed.notify_all()

    def _pending(self) -> list[int]:
        """Return the steps that are being evaluated or wait."""
        waiting = None if self._waiting is None else self._waiting[0]
        return [step for step in (self._running, waiting) if step is not None]

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            step, update = taken
            try:
                record, scores = self._evaluate(step, update)
                with self._changed:
                    if self._stopped:
                        return
                    self._results.add(record, scores)
                    metrics = metrics_of(self._results.content["models"][-1])
                self._log_metrics(step, metrics)
            except Exception as error:  # a failed evaluation must not end the training
                if self._stopped:
                    return
                self._record_failure(step, error)
            finally:
                del taken, update
                with self._changed:
                    self._running = None
                    self._changed.notify_all()

    def _take(self) -> tuple[int, WeightUpdate] | None:
        """Wait for weights; None after `stop`."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._waiting is not None)
            taken, self._waiting = self._waiting, None
            if taken is not None:
                self._running = taken[0]
            return taken

    def _record_failure(self, step: int, error: Exception) -> None:
        is_known = isinstance(error, NemoRLError)
        text = sentence(error) if isinstance(error, NemoRLError) else f"{type(error).__name__}: {error}"
        logger.error("the evaluation of step %d has failed, training continues: %s", step, text, exc_info=not is_known)
        reason = text.partition("\n")[0]  # Ray appends details of a dead worker, which the log has
        self._failed[step] = reason
        self._leave_out(step, f"failed: {reason}")

    def _leave_out(self, step: int, reason: str) -> None:
        try:
            with self._changed:
                self._results.leave_out(step, reason)
        except OSError:
            logger.exception("the file of scores cannot be written")


def metrics_of(model: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics `eval/...` of a model in `scores.json`: its scores, also per environment if it has several.

    Example:
        >>> scores, of_math = {"accuracy": {"value": 0.5}}, {"accuracy": {"value": 0.25}}
        >>> metrics_of({"scores": scores, "environments": {"math": of_math, "nim": {}}, "num_failed": 0})
        {'eval/accuracy': 0.5, 'eval/env_math/accuracy': 0.25, 'eval/num_failed': 0}
    """
    metrics = {f"eval/{name}": score["value"] for name, score in model["scores"].items()}
    if len(model["environments"]) > 1:
        for environment, scores in model["environments"].items():
            metrics |= {f"eval/env_{environment}/{name}": score["value"] for name, score in scores.items()}
    return metrics | {"eval/num_failed": model["num_failed"]}
