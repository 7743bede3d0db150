"""Process setup and attestation that all workers with a model share."""

from __future__ import annotations

import functools
import os
import platform
import socket
import sys
from collections.abc import Callable
from typing import Any, ParamSpec

import torch

from nemo_rl.utils.garbage import gc_paused

Parameters = ParamSpec("Parameters")


def take_cpu_share(num_threads: int | None, num_local_workers: int) -> None:
    """Set torch's number of threads. None: an equal share of this node's CPUs, at least one thread."""
    share = len(os.sched_getaffinity(0)) // num_local_workers
    torch.set_num_threads(num_threads or max(1, share))


def starts_without_collecting(constructor: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Decorate a worker's constructor to run without garbage collection. See `gc_paused`."""

    @functools.wraps(constructor)
    def construct(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        with gc_paused():
            constructor(*args, **kwargs)

    return construct


def process_facts() -> dict[str, Any]:
    """Return where this process runs and with which software: the first part of every worker's attestation."""
    return {
        "hostname": socket.gethostname(),
        "pid": os.getpid(),
        "executable": sys.executable,
        "prefix": sys.prefix,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
    }
