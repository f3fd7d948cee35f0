"""What becomes of memory that a tensor on the CPU no longer needs."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees for what it allocates next, instead of giving it back to the kernel.

    The kernel fills what it hands out with zeros, page by page, and a step of training allocates gigabytes: without
    this, a sixth of its time (benchmarks/README.md). With another C library nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # none
