"""Process setup and attestation that all workers with a model share."""

from __future__ import annotations

import os
import platform
import socket
import sys
from typing import Any

import torch


def take_cpu_share(num_threads: int | None, num_local_workers: int) -> None:
    """Set torch's number of threads. None: an equal share of this node's CPUs, at least one thread."""
    share = len(os.sched_getaffinity(0)) // num_local_workers
    torch.set_num_threads(num_threads or max(1, share))


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
