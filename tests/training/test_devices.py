"""Eight devices train, judge and save as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CLAIMS = Path(__file__).with_name("eight_devices.py")


def test_all_claims_hold_on_eight_emulated_devices():
    """JAX fixes the number of devices when it starts, so they are held to their claims in a process of their own."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "pytest", str(CLAIMS), "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
