"""Environment variables for workers on CPUs: how torch threads share a machine's CPUs and memory, and no GPU."""

from __future__ import annotations

from nemo_rl import settings

# Most parameters of a small model. Its operations are so short that dividing each of them over threads gains little,
# and loses a lot when another process takes one of the cores.
SMALL_MODEL = 10_000_000

# Policy, generation, environment and Ray share the CPUs. OpenMP threads that spin forever keep the thread they wait
# for from running: a step takes up to 30 times as long. Threads that sleep at once must be woken for every operation: a
# step takes 1.4 times as long. So they spin for about 100 microseconds, then sleep.
_SPIN_THEN_SLEEP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "30000"}

# oneDNN keeps compiled kernels for the last 1,024 shapes of matrix products, and torch's layer over it keeps them a
# second time. The number of tokens differs in every step, so the default job's policy worker grew from 0.8 to 3.2 GB in
# 800 steps. The layers of a model repeat 15 shapes within a micro-batch. With 64, it stays at 1.2 GB, and steps take no
# longer.
_FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}

# Since 2.60, Ray leaves a node's GPUs visible to workers without GPUs. Hide them, so that no library uses them.
_NO_GPU = {settings.CUDA_VISIBLE_DEVICES.name: ""}


def cpu_env_vars() -> dict[str, str]:
    """Return the variables of a worker on CPUs: no GPU, how its OpenMP threads wait, and a limit for kernel caches.

    GNU OpenMP, which torch's wheels contain, reads both wait variables; other implementations read the first. If the
    user sets a variable, it is not set here; nor is the other one of its pair.
    """
    users = settings.forwarded().keys()
    pairs = [pair for pair in (_SPIN_THEN_SLEEP, _FEW_KERNELS) if not users & pair.keys()]
    return _NO_GPU | {name: value for pair in pairs for name, value in pair.items()}
