"""Checks the length of a sample, and that a step can be divided into optimizer steps, workers and micro-batches."""

from __future__ import annotations

from nemo_rl.models.policy.config import DATA_PARALLEL, PolicyConfig


def check_sample_length(max_prompt_length: int, max_new_tokens: int, max_sequence_length: int) -> None:
    """Raise `ValueError` if a prompt and its completion may be longer than a sequence, all in tokens."""
    if max_prompt_length + max_new_tokens > max_sequence_length:
        raise ValueError(
            f"data.max_prompt_length ({max_prompt_length}) + policy.generation.max_new_tokens ({max_new_tokens}) "
            f"exceeds policy.max_sequence_length ({max_sequence_length})"
        )


def check_batch_sizes(policy: PolicyConfig, samples_per_step: int, num_workers: int, *, key: str) -> None:
    """Raise `ValueError` if a step cannot be divided as configured.

    Args:
        policy: The policy section.
        samples_per_step: Samples of a training step.
        num_workers: Workers of the policy.
        key: The configuration keys that decide `samples_per_step`.
    """
    batching = policy.batching
    longest = policy.max_sequence_length
    if batching.mode == "packed":  # dynamic batching does not round beyond the width of the batch
        longest = -(-longest // batching.length_multiple) * batching.length_multiple
    if batching.mode != "fixed" and batching.max_tokens < longest:
        raise ValueError(
            f"policy.batching.max_tokens ({batching.max_tokens}) is less than one sequence of "
            f"policy.max_sequence_length ({longest} tokens, in mode packed rounded up to "
            "policy.batching.length_multiple)"
        )
    per_update = policy.train_global_batch_size or samples_per_step
    if samples_per_step % per_update:
        raise ValueError(
            f"{key} ({samples_per_step}) is not a multiple of policy.train_global_batch_size ({per_update})"
        )
    shards = num_shards(policy, num_workers)
    if per_update % shards:
        raise ValueError(
            f"{per_update} samples per optimizer step cannot be split evenly over {shards} data-parallel workers"
        )


def num_shards(policy: PolicyConfig, num_workers: int) -> int:
    """Return the number of data-parallel workers, which each get an equal share of the rows of a batch."""
    return policy.options.layout(num_workers).get_axis_size(DATA_PARALLEL)
