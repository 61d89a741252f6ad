"""Keeping the memory that one training step frees for the next, and no more of it than that."""

from __future__ import annotations

import ctypes
import sys

#: glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep what is freed instead of giving it back to the system; whether it was told.

    On a CPU XLA allocates a program's temporaries anew at every call. Large ones come from `mmap`, so every step would
    have all its pages mapped and zeroed again: a sixth to a fifth of a training step. Call it before JAX starts its
    threads: they are to share one arena, since others take large blocks from `mmap` whatever their number. The process
    then holds its peak until `release_freed_memory`. Elsewhere than on Linux with glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(M_ARENA_MAX, 1), mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1)])


def release_freed_memory() -> None:
    """Give the system back what is free of the memory that was kept, at the end of an epoch and the like.

    Small blocks that live on come to lie in large ones that were freed, which are then too small for the next of their
    kind; without this the process would grow by hundreds of megabytes whenever that happens.
    """
    trim = (
        getattr(ctypes.CDLL(None), "malloc_trim", None)
        if sys.platform.startswith("linux")
        else None
    )
    if trim is not None:
        trim(0)
