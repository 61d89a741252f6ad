"""Description of the machine, and rows of a benchmark as Markdown."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
#: Packages that affect the measurements; their versions are reported.
PACKAGES = (
    "perturbjax",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "grain",
    "torch",
    "cellpose",
    "scikit-image",
    "scikit-learn",
)
#: Instruction sets that determine the speed of matrix products on a CPU.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


class CannotRun(Exception):
    """A benchmark cannot run on this machine; the message gives the reason in one line."""


def machine() -> dict[str, str]:
    """Return processor, usable cores, memory, accelerators and versions, without the host name."""
    facts = {
        "processor": _processor(),
        "cores": str(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "accelerators": ", ".join(_accelerators()) or "none",
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def describe_machine(facts: dict[str, str]) -> str:
    """Describe the machine in one line."""
    gpu = "" if facts["accelerators"] == "none" else f", {facts['accelerators']}"
    return f"{facts['processor']}, {facts['cores']} cores{gpu}, jax {facts.get('jax', '?')}"


def measure_load(seconds: float = 1.0) -> float:
    """Measure the fraction of the processors that other processes use."""
    import psutil

    return psutil.cpu_percent(interval=seconds) / 100


def spreads(rows: Sequence[Row]) -> list[float]:
    """Return maximum / minimum of each cell `0.90 to 1.10` in a column of spreads."""
    texts = [str(value) for row in rows for name, value in row.items() if name.endswith("spread")]
    matches = [re.fullmatch(r"([\d.]+) to ([\d.]+)", text) for text in texts]
    return [float(pair[2]) / float(pair[1]) for pair in matches if pair and float(pair[1])]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    sets = [name for name in INSTRUCTIONS if name in facts.get("flags", "").split()]
    name = facts.get("model name", platform.machine())
    return f"{name} ({', '.join(sets)})" if sets else name


def _accelerators() -> list[str]:
    try:
        process = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return process.stdout.splitlines() if process.returncode == 0 else []


def markdown(rows: Sequence[Row]) -> str:
    """Format a Markdown table: columns in order of first occurrence, numbers with four digits."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    numbers = {c: all(isinstance(row.get(c, 0), int | float) for row in rows) for c in columns}
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---:" if numbers[column] else "---" for column in columns) + "|",
    ]
    lines += [
        "| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def page(parts: dict[str, dict[str, Any]]) -> str:
    """Format all benchmarks as one Markdown page.

    Args:
        parts: {benchmark: {"about", "machine", "quick", "rows"}}. Benchmarks that did not run have
            the reason as "skipped" instead of "rows".
    """
    lines = ["# Benchmarks\n"]
    current: dict[str, str] | None = None
    for name, part in parts.items():
        if part["machine"] != current:
            current = part["machine"]
            facts = "; ".join(f"{fact} {value}" for fact, value in current.items())
            lines.append(f"Measured on: {facts}.\n")
        quick = " (quick: fewer repeats, smaller sizes)" if part["quick"] else ""
        lines.append(f"## {name}{quick}\n\n{part['about']}\n")
        lines.append(
            f"Not run: {part['skipped']}\n" if "skipped" in part else markdown(part["rows"])
        )
    return "\n".join(lines)
