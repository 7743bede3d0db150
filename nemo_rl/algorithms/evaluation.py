"""Scores a model on problems: accuracy, pass@k and majority vote, each with a 95 % confidence interval.

::

    rollout ──► one value per problem and metric ──► mean over the problems, with an interval
                (mean of its samples, pass@k, vote)  all | per environment | per subject | difference of two models

Every metric is a mean over problems of one value per problem. The samples of a problem depend on each other, so they
count as one cluster: the interval follows from the variation between problems, whatever the number of samples
(Miller 2024, "Adding Error Bars to Evals").
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import TYPE_CHECKING

from nemo_rl.algorithms.episodes import collect_rollout
from nemo_rl.algorithms.rollouts import pass_at_k, validation_options

if TYPE_CHECKING:
    from nemo_rl.algorithms.episodes import EpisodeCollector
    from nemo_rl.algorithms.eval_config import EvalConfig
    from nemo_rl.algorithms.rollouts import Rollout
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.environments.interfaces import EnvironmentInterface
    from nemo_rl.models.generation.interfaces import GenerationInterface
    from nemo_rl.observability.timer import Timer

_Z95 = NormalDist().inv_cdf(0.975)
NO_SUBJECT = "(none)"


@dataclass(frozen=True)
class Score:
    """Holds the mean of a metric over problems.

    Attributes:
        value: the mean.
        low, high: its 95 % confidence interval. None: one problem has no variation to compute it from.
        num_problems: number of problems with a value.
    """

    value: float
    low: float | None
    high: float | None
    num_problems: int


@dataclass(frozen=True)
class ProblemScore:
    """Holds the values of one problem.

    Attributes:
        environment: name of its environment.
        problem: its position in the data set.
        subject: the value of `eval.subject_key`; None if no key is configured.
        values: value by metric; empty if none of its samples could be scored.
    """

    environment: str
    problem: int
    subject: str | None
    values: dict[str, float]


def collect_samples(
    config: EvalConfig,
    problems: BatchedDataDict,
    generation: GenerationInterface,
    environment: EnvironmentInterface | EpisodeCollector,
    timer: Timer,
) -> Rollout:
    """Complete the problems with the weights that generation holds, and score them, as a validation in training does.

    With the seed and the problems of a training run, the samples are those of its validation.
    """
    options = validation_options(config.eval.seed, config.eval.num_generations, config.policy.generation.validation)
    return collect_rollout(problems, generation, environment, timer=timer, **options)


def score_problems(rollout: Rollout, problems: BatchedDataDict, config: EvalConfig) -> list[ProblemScore]:
    """Return the values of every problem, in the order of `problems`. Samples that could not be scored are left out.

    The metrics are accuracy (a reward above 0 is correct), reward, completion_length in tokens, truncated, pass@k
    for each k of `eval.k`, and maj@n for the environments that have returned an answer.
    """
    count = config.eval.num_generations
    names = problems.get("environment") or [config.env.name] * problems.size
    rewards, scored = rollout.rewards.tolist(), rollout.scored.tolist()
    answers = rollout.answers or []
    # Environments that score batches return answers, also if they have found none. Of the others, that is not known.
    scores_batches = rollout.episodes is None
    answering = {names[i // count] for i, answer in enumerate(answers) if scores_batches or answer is not None}
    lengths, truncated = rollout.num_completion_tokens.tolist(), rollout.truncated.tolist()
    scores = []
    for row, (name, index) in enumerate(zip(names, problems["problem_index"].tolist(), strict=True)):
        samples = [i for i in range(row * count, (row + 1) * count) if scored[i]]
        values: dict[str, float] = {}
        if samples:
            correct = [rewards[i] > 0 for i in samples]
            values = {
                "accuracy": fmean(correct),
                "reward": fmean(rewards[i] for i in samples),
                **{f"pass@{k}": pass_at_k(len(samples), sum(correct), k) for k in config.eval.ks if k <= len(samples)},
            }
            if name in answering and count > 1:
                values[f"maj@{count}"] = majority_vote([answers[i] for i in samples], correct)
            values["completion_length"] = fmean(lengths[i] for i in samples)
            values["truncated"] = fmean(truncated[i] for i in samples)
        key = config.eval.subject_key
        subject = None if key is None else str(problems["metadata"][row].get(key, NO_SUBJECT))
        scores.append(ProblemScore(name, index, subject, values))
    return scores


def majority_vote(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Return whether the most frequent answer is correct: 1 or 0, or between them if several are equally frequent.

    Answers are equal if their texts are, up to white space. A sample without an answer has no vote. Of equally frequent
    answers one would be drawn, so the value is their mean (Wang et al. 2022, "Self-Consistency Improves Chain of
    Thought Reasoning in Language Models").

    Example:
        >>> majority_vote(["4", "5", "4", None], [True, False, True, False])
        1.0
    """
    votes: dict[str, list[bool]] = {}
    for answer, is_correct in zip(answers, correct, strict=True):
        if answer is not None:
            votes.setdefault(" ".join(answer.split()), []).append(is_correct)
    most = max(map(len, votes.values()), default=0)
    return fmean([fmean(vote) for vote in votes.values() if len(vote) == most]) if votes else 0.0


def mean_score(values: Sequence[float]) -> Score:
    """Return the mean of one value per problem with its 95 % confidence interval.

    s ± 1.96 SE with SE = sqrt(sum_i (s_i - s)^2 / (n (n - 1))), s_i the value of problem i and s their mean: the
    central limit theorem, with the problems as clusters of samples (Miller 2024). For differences s_i = a_i - b_i of
    two models on the same problems, this is the paired standard error, which leaves out what both have in common. The
    interval is too narrow for less than some hundred problems, and of width 0 if all values are equal.

    Example:
        >>> mean_score([0.0, 1.0, 1.0, 0.0]).value
        0.5
    """
    mean = fmean(values)
    if len(values) < 2:
        return Score(mean, None, None, len(values))
    half = _Z95 * stdev(values) / math.sqrt(len(values))
    return Score(mean, mean - half, mean + half, len(values))


def summarize(problems: Iterable[ProblemScore]) -> dict[str, Score]:
    """Return the score of every metric, over the problems that have it."""
    columns: dict[str, list[float]] = {}
    for problem in problems:
        for metric, value in problem.values.items():
            columns.setdefault(metric, []).append(value)
    return {metric: mean_score(values) for metric, values in columns.items()}


def differences(model: Iterable[ProblemScore], baseline: Iterable[ProblemScore]) -> dict[str, Score]:
    """Return the score of the model minus that of the baseline, over the problems for which both have a value."""
    others = {(problem.environment, problem.problem): problem.values for problem in baseline}
    pairs = []
    for problem in model:
        other = others.get((problem.environment, problem.problem), {})
        values = {metric: value - other[metric] for metric, value in problem.values.items() if metric in other}
        pairs.append(ProblemScore(problem.environment, problem.problem, problem.subject, values))
    return summarize(pairs)


def groups_of(problems: Sequence[ProblemScore], attribute: str) -> Mapping[str, list[ProblemScore]]:
    """Return the problems by `attribute`, "environment" or "subject", in alphabetical order, without those of None."""
    counts = Counter(getattr(problem, attribute) for problem in problems)
    names = sorted(name for name in counts if name is not None)
    return {name: [problem for problem in problems if getattr(problem, attribute) == name] for name in names}
