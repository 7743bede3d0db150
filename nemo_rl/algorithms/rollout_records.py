"""Describes the samples of a rollout for `nemo_rl.observability.rollout_files`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from nemo_rl.algorithms.rollouts import Rollout


def rollout_records(rollout: Rollout, *, weights_version: int, environment: str) -> list[dict[str, Any]]:
    """Return a record per sample of a trained batch, then one per sample that dynamic sampling has replaced.

    Args:
        rollout: its batch has `advantages`, [B] or [B, T].
        weights_version: version of the weights that sampled the tokens.
        environment: name of the environment, if it scores batches.
    """
    batch = rollout.batch
    tokens = batch["input_ids"].numpy().astype(np.int32)
    token_mask = batch["token_mask"].numpy() > 0
    logprobs = batch["generation_logprobs"].numpy()
    advantages = batch["advantages"].numpy()
    groups, counted = batch["group"].tolist(), (batch["sample_mask"] > 0).tolist()
    records = []
    for row, episode in enumerate(rollout.episodes or _records_of_completions(rollout, environment)):
        end = episode["tokens"]
        record = {
            **episode,
            "problem": None if episode["problem"] is None else str(episode["problem"]),
            "sample": row,
            "tokens": None,
            "num_tokens": end,
            "sample_mask": False,
            "weights_version": weights_version,
        }
        if row < len(groups):
            record |= {
                "group": groups[row],
                "tokens": tokens[row, :end],
                "token_mask": token_mask[row, :end],
                "generation_logprobs": logprobs[row, :end],
                "sample_mask": counted[row],
                "outcome": "trained" if counted[row] else "masked",
            }
            if advantages.ndim == 1:
                record["advantage"] = float(advantages[row])
            else:
                record["token_advantages"] = advantages[row, :end]
        records.append(record)
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
