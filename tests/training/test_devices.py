"""Eight devices train, judge and save as one does; a CPU holds the memory of one step at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from perturbjax.training.devices import limit_pending_steps

CLAIMS = Path(__file__).with_name("eight_devices.py")


def test_all_claims_hold_on_eight_emulated_devices():
    """JAX fixes the number of devices when it starts, so they are held to their claims in a process of their own."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(CLAIMS),
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_on_a_cpu_no_dispatch_waits_its_turn_holding_memory():
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, y: jnp.tanh(y @ x), x))
    x = jnp.eye(500)
    slow(x).block_until_ready()
    dispatched = []
    for _ in range(3):
        limit_pending_steps(dispatched)
        assert all(one.is_ready() for one in dispatched)
        dispatched.append(slow(x))
