"""Torch threads of workers that share a machine's CPUs."""

from __future__ import annotations

from nemo_rl import settings

# Policy, generation, environment and Ray share the CPUs. Threads that wait for each other without end keep the very
# thread that they wait for from running: a step takes up to thirty times as long. Threads that sleep at once must be
# woken for every operation: a step takes 1.4 times as long. So they spin for some 100 microseconds, then sleep.
_WAIT_A_LITTLE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "30000"}


def cpu_env_vars() -> dict[str, str]:
    """Variables for workers on CPUs: how the OpenMP threads of a process wait for one another.

    GNU's OpenMP, which torch's wheels ship, reads both; any other reads the first. What the user sets wins.
    """
    return {} if settings.forwarded().keys() & _WAIT_A_LITTLE.keys() else dict(_WAIT_A_LITTLE)
