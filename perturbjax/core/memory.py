"""Reuse of freed memory between training steps on CPUs (Linux with glibc).

XLA allocates the temporary arrays of a program again at every call. glibc takes large blocks from
`mmap`, so that the kernel maps and clears all their pages at every step: 17 to 20 % of a training
step. `keep_freed_memory` makes the allocator keep freed blocks in the process.
"""

from __future__ import annotations

import ctypes
import gc
import sys

#: Parameter numbers of `mallopt`. Source: malloc.h of glibc.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
#: New objects after which Python searches for reference cycles.
GARBAGE_OBJECTS = 100_000


def keep_freed_memory() -> bool:
    """Configure glibc to keep freed memory in the process.

    Call it before JAX starts its threads: they must share one arena, because other arenas use
    `mmap` for large blocks. The process then occupies its peak until `release_freed_memory`.

    Returns:
        Whether the allocator was configured; False on other systems.
    """
    mallopt = _glibc_function("mallopt")
    if mallopt is None:
        return False
    # A list instead of a generator, so that all three parameters are set.
    return all([mallopt(M_ARENA_MAX, 1), mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1)])


def release_freed_memory() -> None:
    """Return freed memory to the system, for example at the end of an epoch.

    Small long-lived blocks fragment large freed ones, which are then too small for the next step.
    Without this call the process grows by hundreds of megabytes each time.
    """
    if (trim := _glibc_function("malloc_trim")) is not None:
        trim(0)


def collect_garbage_rarely() -> None:
    """Let Python search for reference cycles after 100,000 new objects instead of 700.

    Imports and the tracing of a network create millions of objects that stay. Python would visit
    them again and again, which takes a tenth of a short command.
    """
    gc.set_threshold(GARBAGE_OBJECTS)


def _glibc_function(name: str) -> ctypes._NamedFuncPointer | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
