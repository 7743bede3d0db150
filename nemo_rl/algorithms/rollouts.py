"""From problems to judged completions, laid out for training."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    """Judged completions of N prompts with G generations each, ordered prompt by prompt (B = N * G).

    Attributes:
        batch: the training batch of `models.policy.interfaces` up to and without `advantages` and policy
            log-probabilities, plus `group` [B] int64 (which prompt of the rollout) and `rewards` [B] float32.
        truncated: [B] bool, completions that ended at the length limit.
        prompts, completions: texts, B each.
        metrics: what the environment says of the batch, without prefix.
    """

    batch: BatchedDataDict
    truncated: torch.Tensor
    prompts: list[str]
    completions: list[str]
    metrics: dict[str, float]

    @property
    def rewards(self) -> torch.Tensor:
        """[B] float32."""
        return self.batch["rewards"]

    @property
    def num_completion_tokens(self) -> torch.Tensor:
        """[B] tokens generated for each completion."""
        return self.batch["token_mask"].sum(dim=1)


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
) -> Rollout:
    """Generate completions for problems and have them judged.

    Args:
        problems: N rows of `input_ids`, `input_lengths`, `prompt` (text), `answer` (text) and `metadata` (dict).
        seed: decides every draw (see `GenerationInterface.generate`).
        streaming: have the completions of a problem judged while those of others are still being generated. The
            rollout is the same.

    Raises:
        EnvironmentFailure: a completion could not be judged; nothing of the rollout is used then.
    """
    prompts = BatchedDataDict({key: problems[key] for key in ("input_ids", "input_lengths")})
    how: dict[str, Any] = {
        "seed": seed,
        "num_generations": num_generations,
        "greedy": greedy,
        "sampling": sampling,
    }
    known = [
        {**metadata, "ground_truth": answer}
        for metadata, answer in zip(problems["metadata"], problems["answer"], strict=True)
    ]
    parts: list[tuple[list[int], GenerationResult, Future[EnvironmentReturn]]] = []
    with ThreadPoolExecutor(1, "judge") as judge:
        with timer.phase("generation"):
            whole = list(range(problems.size))
            pieces = generation.stream(prompts, **how) if streaming else [(whole, generation.generate(prompts, **how))]
            for chosen, piece in pieces:
                of_completions = [known[position] for position in chosen for _ in range(num_generations)]
                parts.append((chosen, piece, judge.submit(environment.step, piece.texts, of_completions)))
        with timer.phase("reward"):
            judged = [verdict.result() for _, _, verdict in parts]
            positions = [position for chosen, _, _ in parts for position in chosen]
            order = _row_order(positions, num_generations)
            verdict, metrics = environment.global_post_process_and_metrics(_judged_in_order(judged, order))
    results = [piece for _, piece, _ in parts]
    batch = _batch_in_order([training_batch(result) for result in results], order)
    batch["group"] = torch.arange(problems.size).repeat_interleave(num_generations)
    batch["rewards"] = torch.tensor(verdict.rewards, dtype=torch.float32)
    truncated = torch.cat([result.truncated for result in results])
    return Rollout(
        batch=batch,
        truncated=truncated if order is None else truncated[torch.from_numpy(order)],
        prompts=[text for text in problems["prompt"] for _ in range(num_generations)],
        completions=_list_in_order([result.texts for result in results], order),
        metrics=metrics,
    )


def _row_order(positions: list[int], num_generations: int) -> npt.NDArray[np.int64] | None:
    """Where to find row 0, 1, ... of the rollout among the rows of the pieces, which hold `positions` one by one.

    None where the pieces hold them in order.
    """
    place = np.argsort(positions)  # positions are 0, 1, ... in some order, so this is where each of them lies
    if np.array_equal(place, np.arange(len(place))):
        return None
    return (place[:, None] * num_generations + np.arange(num_generations)).ravel()


def _batch_in_order(batches: list[BatchedDataDict], order: npt.NDArray[np.int64] | None) -> BatchedDataDict:
    whole = batches[0] if len(batches) == 1 else BatchedDataDict.from_batches(batches)
    return whole if order is None else whole.select_indices(torch.from_numpy(order))


def _list_in_order(parts: list[list[Any]], order: npt.NDArray[np.int64] | None) -> list[Any]:
    whole = parts[0] if len(parts) == 1 else [value for part in parts for value in part]
    return whole if order is None else [whole[row] for row in order]


def _judged_in_order(parts: list[EnvironmentReturn], order: npt.NDArray[np.int64] | None) -> EnvironmentReturn:
    """What was said of the pieces as one, in the order of the rollout."""
    if len(parts) == 1 and order is None:
        return parts[0]
    rows = slice(None) if order is None else order

    def array(name: str) -> npt.NDArray[Any]:
        joined: npt.NDArray[Any] = np.concatenate([getattr(part, name) for part in parts])[rows]
        return joined

    def values(name: str) -> list[Any]:
        return _list_in_order([getattr(part, name) for part in parts], order)

    return EnvironmentReturn(
        rewards=array("rewards"),
        terminated=array("terminated"),
        answers=values("answers"),
        status=values("status"),
        latency_s=array("latency_s"),
        observations=None if parts[0].observations is None else values("observations"),
    )


def training_batch(result: GenerationResult) -> BatchedDataDict:
    """The completions in the layout of `models.policy.interfaces`, every completion token and sample counted."""
    positions = torch.arange(result.output_ids.shape[1])
    in_completion = (positions >= result.prompt_lengths[:, None]) & (positions < result.output_lengths[:, None])
    return BatchedDataDict(
        input_ids=result.output_ids,
        input_lengths=result.output_lengths,
        token_mask=in_completion.float(),
        sample_mask=torch.ones(len(result.output_ids)),
        generation_logprobs=result.logprobs,
    )


def concatenate(rollouts: list[Rollout], pad_token_id: int) -> Rollout:
    """Several rollouts as one; groups stay apart."""
    if len(rollouts) == 1:
        return rollouts[0]
    first_free = 0
    for rollout in rollouts:
        rollout.batch["group"] = rollout.batch["group"] + first_free
        first_free = int(rollout.batch["group"].max()) + 1
    sizes = [len(rollout.completions) for rollout in rollouts]
    return Rollout(
        batch=BatchedDataDict.from_batches([r.batch for r in rollouts], pad_value_dict={"input_ids": pad_token_id}),
        truncated=torch.cat([r.truncated for r in rollouts]),
        prompts=[text for r in rollouts for text in r.prompts],
        completions=[text for r in rollouts for text in r.completions],
        metrics=_weighted_mean([r.metrics for r in rollouts], sizes),
    )


def select(rollout: Rollout, rows: torch.Tensor) -> Rollout:
    """The samples at `rows` (a boolean mask [B], or indices)."""
    indices = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
    chosen = indices.tolist()
    return Rollout(
        batch=rollout.batch.select_indices(indices),
        truncated=rollout.truncated[indices],
        prompts=[rollout.prompts[i] for i in chosen],
        completions=[rollout.completions[i] for i in chosen],
        metrics=rollout.metrics,
    )


def draw_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts and on nothing else: no generator state has to survive a restart."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k completions is right.

    1 - C(n - c, k) / C(n, k), Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.

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
