"""What one step frees, the next gets without asking the system, until it is given back."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from perturbjax.core.memory import give_back_freed_memory, keep_freed_memory
if sys.argv[1] != "let go":
    assert keep_freed_memory()
def fill():
    if sys.argv[1] == "give back":
        give_back_freed_memory()
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc's allocator is told")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    assert page_faults("keep") < 10 < page_faults("let go")
    assert page_faults("give back") > 10
