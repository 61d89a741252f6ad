"""Keeping the memory that one training step frees for the next."""

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
    then holds its peak until it ends. Elsewhere than on Linux with glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(M_ARENA_MAX, 1), mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1)])
