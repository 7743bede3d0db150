"""Waits for the replies of episodes, for tests of all that runs them."""

from __future__ import annotations

from nemo_rl.environments.episode_calls import EpisodeRunner, Reply


def next_replies(runner: EpisodeRunner, count: int) -> list[Reply]:
    """Return the next replies, at least `count` of them."""
    found: list[Reply] = []
    while len(found) < count:
        some = runner.collect(timeout_s=60)
        assert some, f"only {len(found)} of {count} replies arrived: {found}"
        found += some
    return found
