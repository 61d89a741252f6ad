"""Freed memory is reused without page faults until it is released."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from perturbjax.core.memory import release_freed_memory, keep_freed_memory
if sys.argv[1] != "default":
    assert keep_freed_memory()
def fill():
    if sys.argv[1] == "release":
        release_freed_memory()
    np.empty(36 << 20, np.uint8).fill(1)
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, timeout=60, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="configures the allocator of glibc"
)
def test_keep_freed_memory_avoids_page_faults():
    assert page_faults("keep") < 10 < page_faults("default")
    assert page_faults("release") > 10
