"""Torch threads of workers that share a machine's CPUs."""

from __future__ import annotations

from nemo_rl import settings


def cpu_env_vars() -> dict[str, str]:
    """Variables for workers on CPUs: threads that wait for each other sleep instead of spinning.

    Policy, generation, environment and Ray share the CPUs: a spinning thread keeps the very thread that it waits for
    from running, and a step takes up to thirty times as long. The user's own OMP_WAIT_POLICY wins.
    """
    return {} if "OMP_WAIT_POLICY" in settings.forwarded() else {"OMP_WAIT_POLICY": "PASSIVE"}
