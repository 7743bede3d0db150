"""Checks the length of a sample, and that a step can be divided into optimizer steps, workers and micro-batches."""

from __future__ import annotations

from nemo_rl.models.policy.config import DATA_PARALLEL, PolicyConfig

_NUMBERS = {1: "one sequence", 2: "a pair of sequences"}


def check_sample_length(max_prompt_length: int, max_new_tokens: int, max_sequence_length: int) -> None:
    """Raise `ValueError` if a prompt and its completion may be longer than a sequence, all in tokens."""
    if max_prompt_length + max_new_tokens > max_sequence_length:
        raise ValueError(
            f"data.max_prompt_length ({max_prompt_length}) + policy.generation.max_new_tokens ({max_new_tokens}) "
            f"exceeds policy.max_sequence_length ({max_sequence_length})"
        )


def check_batch_sizes(
    policy: PolicyConfig, samples_per_step: int, num_workers: int, *, key: str, rows_per_group: int = 1
) -> None:
    """Raise `ValueError` if a step cannot be divided as configured.

    Args:
        policy: The policy section.
        samples_per_step: Samples of a training step.
        num_workers: Workers of the policy.
        key: The configuration keys that decide `samples_per_step`.
        rows_per_group: Samples that stay in one micro-batch: 2 for preference pairs.
    """
    batching = policy.batching
    longest = policy.max_sequence_length
    if policy.train_micro_batch_size % rows_per_group and batching.mode == "fixed":
        raise ValueError(
            f"policy.train_micro_batch_size ({policy.train_micro_batch_size}) counts conversations and must be a "
            f"multiple of {rows_per_group}, so that those of a pair are in one micro-batch"
        )
    if batching.mode == "packed":  # dynamic batching does not round beyond the width of the batch
        longest = -(-longest // batching.length_multiple) * batching.length_multiple
    if batching.mode != "fixed" and batching.max_tokens < rows_per_group * longest:
        raise ValueError(
            f"policy.batching.max_tokens ({batching.max_tokens}) is less than {_NUMBERS[rows_per_group]} of "
            f"policy.max_sequence_length ({longest} tokens, in mode packed rounded up to "
            "policy.batching.length_multiple)"
        )
    per_update = policy.train_global_batch_size or samples_per_step
    if samples_per_step % per_update:
        raise ValueError(
            f"{key} ({samples_per_step}) is not a multiple of policy.train_global_batch_size ({per_update})"
        )
    shards = num_shards(policy, num_workers)
    if per_update % (shards * rows_per_group):
        kind = "samples" if rows_per_group == 1 else f"conversations ({per_update / rows_per_group:g} pairs)"
        raise ValueError(
            f"{per_update} {kind} per optimizer step cannot be split evenly over {shards} data-parallel workers"
        )


def num_shards(policy: PolicyConfig, num_workers: int) -> int:
    """Return the number of data-parallel workers, which each get an equal share of the rows of a batch."""
    return policy.options.layout(num_workers).get_axis_size(DATA_PARALLEL)
