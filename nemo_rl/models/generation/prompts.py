"""What every backend asks of prompts; checked by the driver before a worker is called, and by the worker again."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_rl.errors import ModelError


def check_prompt_lengths(lengths: Sequence[int], max_sequence_length: int, first_prompt: int = 0) -> None:
    """Raise `ModelError` for the first prompt that is empty or leaves no room for a single new token.

    Args:
        lengths: in tokens.
        max_sequence_length: longest prompt plus completion.
        first_prompt: number of the first of these prompts, for the message.
    """
    for index, length in enumerate(lengths, start=first_prompt):
        if length == 0:
            raise ModelError(f"prompt {index} is empty; a completion needs at least one token to start from")
        if length >= max_sequence_length:
            raise ModelError(
                f"prompt {index} has {length} tokens and leaves no room for a new one: prompt and completion together "
                f"may have {max_sequence_length} (policy.max_sequence_length)"
            )
