"""Environment variables for workers on CPUs: how torch threads share a machine's CPUs, and no GPU."""

from __future__ import annotations

from nemo_rl import settings

# Most parameters of a small model. Its operations are so short that dividing each of them over threads gains little,
# and loses a lot when another process takes one of the cores.
SMALL_MODEL = 10_000_000

# Policy, generation, environment and Ray share the CPUs. OpenMP threads that spin forever keep the thread they wait
# for from running: a step takes up to 30 times as long. Threads that sleep at once must be woken for every operation: a
# step takes 1.4 times as long. So they spin for about 100 microseconds, then sleep.
_SPIN_THEN_SLEEP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "30000"}

# Since 2.60, Ray leaves a node's GPUs visible to workers without GPUs. Hide them, so that no library uses them.
_NO_GPU = {settings.CUDA_VISIBLE_DEVICES.name: ""}


def cpu_env_vars() -> dict[str, str]:
    """Return the variables of a worker on CPUs: no GPU, and how its OpenMP threads wait for one another.

    GNU OpenMP, which torch's wheels contain, reads both wait variables; other implementations read the first. If the
    user sets one of them, neither is set here.
    """
    waiting = {} if settings.forwarded().keys() & _SPIN_THEN_SLEEP.keys() else _SPIN_THEN_SLEEP
    return {**_NO_GPU, **waiting}
