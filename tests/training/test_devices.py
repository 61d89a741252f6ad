"""Tests of several devices (in a process with eight emulated devices) and of the queue of device
calls.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from perturbjax.training.devices import limit_pending_steps

pytestmark = pytest.mark.full

TESTS = Path(__file__).with_name("eight_devices.py")


def test_eight_emulated_devices():
    """JAX fixes the number of devices when it starts, so these tests run in a separate process."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(TESTS),
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_limit_pending_steps_allows_one_step_on_cpu():
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, y: jnp.tanh(y @ x), x))
    x = jnp.eye(500)
    slow(x).block_until_ready()
    queued = []
    for _ in range(3):
        limit_pending_steps(queued)
        assert all(result.is_ready() for result in queued)
        queued.append(slow(x))
