"""Rollouts: generates and grades completions of problems, as batches for training."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.environments.interfaces import EnvironmentReturn

if TYPE_CHECKING:
    from nemo_rl.environments.interfaces import EnvironmentInterface
    from nemo_rl.models.generation.config import SamplingConfig
    from nemo_rl.models.generation.interfaces import GenerationInterface, GenerationResult
    from nemo_rl.observability.timer import Timer


@dataclass(frozen=True)
class Rollout:
    """Holds the graded completions of N prompts with G completions each, ordered by prompt (B = N * G).

    Attributes:
        batch: the training batch of `models.policy.interfaces` without `advantages` and policy log-probabilities, plus
            `group` [B] int64 (index of the prompt in the rollout) and `rewards` [B] float32. Of environments with
            turns also `turn_index` [B, T] int64 (the turn of each trained token, from 1; else 0), `turn_rewards` [B, K]
            and `num_turns` [B] int64.
        truncated: [B] bool, True for completions that ended at the length limit.
        prompts, completions: B texts each.
        metrics: metrics of the environment, without a prefix.
        failed: [B] bool, True for samples that the environment could not score. None: there are none.
        episodes: of environments with turns: a record of each sample's episode as JSON data, and behind them the
            records of episodes that dynamic sampling has replaced.
        branches: further transcripts of the samples, as rows of a training batch with the row of their sample as
            `sample` [R] int64. `branches.training_rows` joins them with `batch`. None: each sample has one transcript.
        answers: the answer of each sample as its environment has read it; None for a sample without one. None: the
            environment returns no answers.
    """

    batch: BatchedDataDict
    truncated: torch.Tensor
    prompts: list[str]
    completions: list[str]
    metrics: dict[str, float]
    failed: torch.Tensor | None = None
    episodes: list[dict[str, Any]] | None = None
    branches: BatchedDataDict | None = None
    answers: list[str | None] | None = None

    @property
    def scored(self) -> torch.Tensor:
        """[B] bool, True for samples whose reward says how good they are."""
        return torch.ones(len(self.completions), dtype=torch.bool) if self.failed is None else ~self.failed

    @property
    def rewards(self) -> torch.Tensor:
        """Rewards, [B] float32."""
        return self.batch["rewards"]

    @property
    def num_completion_tokens(self) -> torch.Tensor:
        """Sampled tokens of each sample, [B]."""
        counts = self.batch["token_mask"].sum(dim=1)
        if self.branches is not None:
            counts = counts.index_add(0, self.branches["sample"], self.branches["token_mask"].sum(dim=1))
        return counts


class _GenerateOptions(TypedDict):
    seed: int
    num_generations: int
    greedy: bool
    sampling: SamplingConfig | None


def collect(
    problems: BatchedDataDict,
    generation: GenerationInterface,
    environment: EnvironmentInterface,
    *,
    num_generations: int,
    seed: int,
    timer: Timer,
    greedy: bool = False,
    sampling: SamplingConfig | None = None,
    streaming: bool = False,
    while_grading: Callable[[BatchedDataDict], None] = lambda batch: None,
) -> Rollout:
    """Generate completions for problems and grade them.

    Args:
        problems: N rows of `input_ids`, `input_lengths`, `prompt` (text), `answer` (text) and `metadata` (dict).
        num_generations: completions per problem (G).
        seed: determines every sampled token (see `GenerationInterface.generate`).
        timer: receives the phases "generation" and "reward".
        greedy: take the most likely token instead of sampling.
        sampling: overrides the configured temperature, top-p and top-k.
        streaming: grade the completions of a problem while those of others are being generated. The result is equal.
        while_grading: called with the batch of the rollout, without rewards, after everything has been generated. Its
            time belongs to no phase.

    Raises:
        EnvironmentFailure: a completion could not be graded. The rollout is discarded.
    """
    prompts = BatchedDataDict({key: problems[key] for key in ("input_ids", "input_lengths")})
    options: _GenerateOptions = {
        "seed": seed,
        "num_generations": num_generations,
        "greedy": greedy,
        "sampling": sampling,
    }
    metadata = [
        {**record, "ground_truth": answer}
        for record, answer in zip(problems["metadata"], problems["answer"], strict=True)
    ]
    positions: list[int] = []  # of the problems, in the order of the results
    results: list[GenerationResult] = []
    grades: list[Future[EnvironmentReturn]] = []
    with ThreadPoolExecutor(1, "grading") as executor:
        with timer.phase("generation"):
            if streaming:
                chunks = generation.stream(prompts, **options)
            else:
                chunks = iter([(list(range(problems.size)), generation.generate(prompts, **options))])
            for indices, result in chunks:
                repeated = [metadata[index] for index in indices for _ in range(num_generations)]
                positions += indices
                results.append(result)
                grades.append(executor.submit(environment.step, result.texts, repeated))
        # Row i of the rollout is row order[i] of the concatenated results.
        order = (np.argsort(positions)[:, None] * num_generations + np.arange(num_generations)).ravel()
        rows = torch.from_numpy(order)
        batch = BatchedDataDict.from_batches([training_batch(result) for result in results]).select_indices(rows)
        batch["group"] = torch.arange(problems.size).repeat_interleave(num_generations)
        while_grading(batch)
        with timer.phase("reward"):
            graded, metrics = environment.global_post_process_and_metrics(
                _concatenate_grades([grade.result() for grade in grades], order)
            )
    batch["rewards"] = torch.tensor(graded.rewards, dtype=torch.float32)
    return Rollout(
        batch=batch,
        truncated=torch.cat([result.truncated for result in results])[rows],
        prompts=[text for text in problems["prompt"] for _ in range(num_generations)],
        completions=_concatenate_lists([result.texts for result in results], order),
        metrics=metrics,
        answers=graded.answers,
    )


def _concatenate_lists(parts: list[list[Any]], order: npt.NDArray[np.int64]) -> list[Any]:
    values = [value for part in parts for value in part]
    return [values[row] for row in order]


def _concatenate_grades(parts: list[EnvironmentReturn], order: npt.NDArray[np.int64]) -> EnvironmentReturn:
    """Join the grades of several chunks and put them into the order of the rollout."""

    def array(name: str) -> npt.NDArray[Any]:
        joined: npt.NDArray[Any] = np.concatenate([getattr(part, name) for part in parts])[order]
        return joined

    def values(name: str) -> list[Any]:
        return _concatenate_lists([getattr(part, name) for part in parts], order)

    return EnvironmentReturn(
        rewards=array("rewards"),
        terminated=array("terminated"),
        answers=values("answers"),
        status=values("status"),
        latency_s=array("latency_s"),
        observations=None if parts[0].observations is None else values("observations"),
    )


def training_batch(result: GenerationResult) -> BatchedDataDict:
    """Convert completions to the layout of `models.policy.interfaces`; all completion tokens and samples count."""
    positions = torch.arange(result.output_ids.shape[1])
    in_completion = (positions >= result.prompt_lengths[:, None]) & (positions < result.output_lengths[:, None])
    batch = BatchedDataDict(
        input_ids=result.output_ids,
        input_lengths=result.output_lengths,
        token_mask=in_completion.float(),
        sample_mask=torch.ones(len(result.output_ids)),
        generation_logprobs=result.logprobs,
        sampling_logprobs=result.sampling_logprobs,
    )
    if result.routed_experts is not None:
        batch["routed_experts"] = result.routed_experts
    return batch


def concatenate(rollouts: list[Rollout], pad_token_id: int) -> Rollout:
    """Join several rollouts into one. Groups of different rollouts stay separate."""
    if len(rollouts) == 1:
        return rollouts[0]
    num_groups = 0
    for rollout in rollouts:
        rollout.batch["group"] = rollout.batch["group"] + num_groups
        num_groups = int(rollout.batch["group"].max()) + 1
    sizes = [len(rollout.completions) for rollout in rollouts]
    return Rollout(
        batch=BatchedDataDict.from_batches([r.batch for r in rollouts], pad_value_dict={"input_ids": pad_token_id}),
        truncated=torch.cat([r.truncated for r in rollouts]),
        prompts=[text for r in rollouts for text in r.prompts],
        completions=[text for r in rollouts for text in r.completions],
        metrics=_weighted_mean([r.metrics for r in rollouts], sizes),
        failed=None if rollouts[0].failed is None else ~torch.cat([r.scored for r in rollouts]),
        episodes=None if rollouts[0].episodes is None else [e for r in rollouts for e in r.episodes or ()],
        branches=_concatenate_branches(rollouts, sizes, pad_token_id),
        answers=None if rollouts[0].answers is None else [answer for r in rollouts for answer in r.answers or ()],
    )


def _concatenate_branches(rollouts: list[Rollout], sizes: list[int], pad_token_id: int) -> BatchedDataDict | None:
    parts = []
    for rollout, start in zip(rollouts, itertools.accumulate(sizes, initial=0)):
        if rollout.branches is not None:
            part = BatchedDataDict(dict(rollout.branches.get_dict()))
            part["sample"] = part["sample"] + start
            parts.append(part)
    return BatchedDataDict.from_batches(parts, pad_value_dict={"input_ids": pad_token_id}) if parts else None


def select(rollout: Rollout, rows: torch.Tensor) -> Rollout:
    """Select the samples at `rows` (a boolean mask [B], or indices)."""
    indices = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
    selected = indices.tolist()
    return Rollout(
        batch=rollout.batch.select_indices(indices),
        truncated=rollout.truncated[indices],
        prompts=[rollout.prompts[i] for i in selected],
        completions=[rollout.completions[i] for i in selected],
        metrics=rollout.metrics,
        failed=None if rollout.failed is None else rollout.failed[indices],
        episodes=None if rollout.episodes is None else [rollout.episodes[i] for i in selected],
        branches=_select_branches(rollout, indices),
        answers=None if rollout.answers is None else [rollout.answers[i] for i in selected],
    )


def _select_branches(rollout: Rollout, indices: torch.Tensor) -> BatchedDataDict | None:
    if rollout.branches is None:
        return None
    new_rows = torch.full((len(rollout.completions),), -1)
    new_rows[indices] = torch.arange(len(indices))
    samples = new_rows[rollout.branches["sample"]]
    kept = (samples >= 0).nonzero().flatten()
    if not len(kept):
        return None
    branches = rollout.branches.select_indices(kept)
    branches["sample"] = samples[kept]
    return branches


class ValidationOptions(TypedDict):
    """How a validation samples; options of `collect`."""

    num_generations: int
    seed: int
    greedy: bool
    sampling: SamplingConfig | None


def validation_options(seed: int, num_generations: int, sampling: SamplingConfig | None) -> ValidationOptions:
    """Return how a validation samples. One completion per problem is greedy unless sampling is configured.

    Args:
        seed: Seed of the run.
        num_generations: Completions per problem.
        sampling: The configured sampling of validations, or None.
    """
    return {
        "num_generations": num_generations,
        "seed": draw_seed(seed, "validation"),
        "greedy": num_generations == 1 and sampling is None,
        "sampling": sampling,
    }


def draw_seed(*parts: int | str) -> int:
    """Derive a 63-bit seed from `parts` alone, so that a restart needs no saved generator state.

    Example:
        >>> draw_seed(42, "train", 1) == draw_seed(42, "train", 1)
        True
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Estimate, without bias, the probability that at least one of k completions is correct.

    1 - C(n - c, k) / C(n, k), Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.

    Example:
        >>> pass_at_k(num_samples=4, num_correct=1, k=2)
        0.5

    Raises:
        ValueError: k is not between 1 and `num_samples`, or `num_correct` is not between 0 and `num_samples`.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= n and 0 <= c <= n, got n={num_samples}, c={num_correct}")
    all_wrong = 1.0
    for i in range(k):
        all_wrong *= max(0, num_samples - num_correct - i) / (num_samples - i)
    return 1.0 - all_wrong


def _weighted_mean(records: list[dict[str, float]], weights: list[int]) -> dict[str, float]:
    names = {name for record in records for name in record}
    means = {}
    for name in sorted(names):
        pairs = [(record[name], weight) for record, weight in zip(records, weights) if name in record]
        means[name] = sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
    return means
