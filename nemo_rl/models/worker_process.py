"""What every worker that holds a model does with its process, whatever the backend."""

from __future__ import annotations

import gc
import os
import platform
import socket
import sys
from typing import Any

import torch


def take_cpu_share(num_threads: int | None, num_local_workers: int) -> None:
    """Compute with `num_threads` threads; None: with an equal share of this node's CPUs, at least one."""
    share = len(os.sched_getaffinity(0)) // num_local_workers
    torch.set_num_threads(num_threads or max(1, share))


def freeze_modules() -> None:
    """Keep what has been made so far out of garbage collection.

    Modules live as long as the process: without this each full collection walks through all of them.
    """
    gc.collect()
    gc.freeze()


def process_facts() -> dict[str, Any]:
    """Where this process runs, and on what: the first part of every worker's attestation."""
    return {
        "hostname": socket.gethostname(),
        "pid": os.getpid(),
        "executable": sys.executable,
        "prefix": sys.prefix,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
    }
