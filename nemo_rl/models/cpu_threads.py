"""What workers on CPUs are started with: torch threads that share a machine's CPUs, and no GPU."""

from __future__ import annotations

from nemo_rl import settings

# Policy, generation, environment and Ray share the CPUs. Threads that wait for each other without end keep the very
# thread that they wait for from running: a step takes up to thirty times as long. Threads that sleep at once must be
# woken for every operation: a step takes 1.4 times as long. So they spin for some 100 microseconds, then sleep.
_WAIT_A_LITTLE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "30000"}


# Since 2.60, Ray leaves a node's GPUs visible to workers that were given none; no library shall start to use them.
_NO_GPU = {settings.CUDA_VISIBLE_DEVICES.name: ""}


def cpu_env_vars() -> dict[str, str]:
    """Variables for workers on CPUs: no GPU, and how the OpenMP threads of a process wait for one another.

    GNU's OpenMP, which torch's wheels ship, reads both of those; any other reads the first. What the user sets wins.
    """
    waiting = {} if settings.forwarded().keys() & _WAIT_A_LITTLE.keys() else _WAIT_A_LITTLE
    return {**_NO_GPU, **waiting}
