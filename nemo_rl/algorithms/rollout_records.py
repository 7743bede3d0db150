"""Describes the samples of a rollout for `nemo_rl.observability.rollout_files`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from nemo_rl.algorithms.branches import TrainingRows
    from nemo_rl.algorithms.rollouts import Rollout


def rollout_records(
    rollout: Rollout, rows: TrainingRows, *, weights_version: int, environment: str
) -> list[dict[str, Any]]:
    """Return a record per transcript of a trained batch, then one per sample that dynamic sampling has replaced.

    Args:
        rollout: the rollout.
        rows: its training batch with `advantages`, [R] or [R, T]; without them, those of the records are null.
        weights_version: version of the weights that sampled the tokens.
        environment: name of the environment, if it scores batches.
    """
    batch = rows.batch
    tokens = batch["input_ids"].numpy().astype(np.int32)
    token_mask = batch["token_mask"].numpy() > 0
    logprobs = batch["generation_logprobs"].numpy()
    advantages = batch["advantages"].numpy() if "advantages" in batch else None
    of_rows = advantages.tolist() if advantages is not None and advantages.ndim == 1 else None
    lengths, groups = batch["input_lengths"].tolist(), rollout.batch["group"].tolist()
    counted = (rollout.batch["sample_mask"] > 0).tolist()
    samples = list(rollout.episodes or _records_of_completions(rollout, environment))
    rows_of: dict[int, list[int]] = {}
    is_padding = (~token_mask.any(axis=1)).tolist()
    for row, sample in enumerate(rows.samples.tolist()):
        if not is_padding[row] or sample not in rows_of:
            rows_of.setdefault(sample, []).append(row)
    records = []
    for sample, episode in enumerate(samples):
        record = {
            **episode,
            "problem": None if episode["problem"] is None else str(episode["problem"]),
            "sample": sample,
            "weights_version": weights_version,
        }
        if sample >= len(groups):
            records.append(record | {"tokens": None, "num_tokens": episode["tokens"], "sample_mask": False})
            continue
        record["group"] = groups[sample]
        record["sample_mask"] = counted[sample]
        record["outcome"] = "trained" if counted[sample] else "masked"
        for branch, row in enumerate(rows_of[sample]):
            end = lengths[row]
            of_row: dict[str, Any] = {
                "branch": branch,
                "tokens": tokens[row, :end],
                "num_tokens": end,
                "token_mask": token_mask[row, :end],
                "generation_logprobs": logprobs[row, :end],
            }
            if of_rows is not None:
                of_row["advantage"] = of_rows[row]
            elif advantages is not None:
                of_row["token_advantages"] = advantages[row, :end]
            records.append(record | of_row)
    return records


def _records_of_completions(rollout: Rollout, environment: str) -> list[dict[str, Any]]:
    """Return what `Rollout.episodes` has for environments with turns."""
    columns = (
        rollout.prompts,
        rollout.completions,
        rollout.rewards.tolist(),
        rollout.truncated.tolist(),
        rollout.batch["input_lengths"].tolist(),
    )
    return [
        {
            "environment": environment,
            "problem": None,
            "reward": reward,
            "turns": 1,
            "tokens": length,
            "end": "max_tokens" if truncated else "done",
            "outcome": "trained",
            "failure": "",
            "attempts": 1,
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": completion, "reward": reward},
            ],
        }
        for prompt, completion, reward, truncated, length in zip(*columns, strict=True)
    ]
