"""Tunes the C library's allocator for a training process, which allocates the same sizes in every step."""

from __future__ import annotations

import ctypes
import logging

logger = logging.getLogger(__name__)

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 2**30
# The largest that glibc accepts; larger blocks always come from the kernel.
_HEAP_BLOCK_BYTES = 32 * 2**20


def keep_freed_memory() -> None:
    """Let this process keep freed memory, up to 1 GiB at the top of the heap, instead of returning it to the kernel.

    This applies to blocks of up to 32 MiB.

    A training step on the CPU frees the memory that the next step allocates. By default glibc returns large blocks to
    the kernel, which clears them page by page when they are allocated again: 3,100 page faults, or 14 of 180 ms per
    step (Llama with 0.6 M parameters, 2,560 tokens, one core). With this setting it is 300 page faults and 4 ms. The
    function does nothing if the C library has no `mallopt`.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError) as error:
        logger.debug("the allocator is unchanged: %s", error)
        return
    mallopt(_M_MMAP_THRESHOLD, _HEAP_BLOCK_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
