"""Run all benchmarks that this machine supports, and write their tables.

    python -m experiments.bench --out DIR [--quick] [--only step] [--readme docs/performance.md]

Each benchmark is a module of this package with `run(quick)`, which returns rows or yields the rows
so far. It runs in a separate process, because JAX and PyTorch each reserve a whole accelerator, and
writes `DIR/NAME.json`. `bench.md` and `bench.json` combine all of them.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import bench
from experiments.bench.tables import (
    CannotRun,
    Row,
    describe_machine,
    machine,
    markdown,
    measure_load,
    page,
    spreads,
)
from perturbjax.cli import parse_options
from perturbjax.core.errors import InputError, run_command
from perturbjax.core.files import atomic, make_folder, read_json, write_json
from perturbjax.core.messages import console
from perturbjax.core.options import require_sound

#: Modules of this package that are not benchmarks.
HELPERS = ("__main__", "aot_programs", "commands", "hlo", "mosaic", "roofline", "sizes", "tables")
NAMES = tuple(m.name for m in pkgutil.iter_modules(bench.__path__) if m.name not in HELPERS)
#: Benchmarks that analyze compiled programs and measure no time.
COUNTED = ("aot",)
#: Maximum fraction of the processors in use by other processes, and maximum ratio of the times of
#: one variant.
MAX_OTHERS, MAX_SPREAD = 0.1, 1.5
MARKED = re.compile(
    r"(?P<open><!-- bench (?P<name>\w+) -->)\n.*?(?P<close><!-- end bench -->)", re.DOTALL
)


@dataclass(frozen=True)
class Config:
    """Measure speed and write tables."""

    out: Path
    """Folder for NAME.json, bench.json and bench.md."""
    quick: bool = False
    """Fewer repeats and smaller sizes, to test the benchmarks."""
    only: str = ""
    """Run only this benchmark; by default all."""
    tables_only: bool = False
    """Run no benchmark; write the tables of the results in --out."""
    readme: str = ""
    """Markdown file with tables between <!-- bench NAME --> and <!-- end bench --> to update.
    Times from a busy machine are refused."""
    even_busy: bool = False
    """Update tables also with times from a busy machine."""

    def __post_init__(self) -> None:
        require_sound(self)


def measure(name: str, quick: bool, save: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Run one benchmark.

    Args:
        name: module of this package.
        quick: fewer repeats and smaller sizes.
        save: called with the result so far, after every step of a benchmark that yields rows.

    Returns:
        The rows and the machine, or the reason why the benchmark cannot run.
    """
    part: dict[str, Any] = {
        "about": "",
        "machine": machine(),
        "quick": quick,
        "others": measure_load(),
    }
    try:
        module = importlib.import_module(f"experiments.bench.{name}")
        part["about"] = " ".join((module.__doc__ or "").strip().split("\n\n")[0].split())
        rows = module.run(quick)
        if isinstance(rows, Iterator):
            done: list[Row] = []
            for done in rows:
                save({**part, "rows": done})
            rows = done
        return {**part, "rows": rows}
    except (CannotRun, ImportError, InputError) as reason:
        return {**part, "skipped": " ".join(str(reason).split())}


def write_tables(out: Path) -> Path:
    """Combine every `NAME.json` of a folder in `bench.json` and `bench.md`."""
    parts = {
        name: read_json(out / f"{name}.json") for name in NAMES if (out / f"{name}.json").is_file()
    }
    write_json(out / "bench.json", parts)
    with atomic(out / "bench.md") as temporary:
        temporary.write_text(page(parts))
    return out / "bench.md"


def run_one(name: str, quick: bool, out: Path) -> None:
    """Run one benchmark in this process and save its result.

    Raises:
        InputError: no benchmark has this name.
    """
    if name not in NAMES:
        raise InputError(f"--only {name}: unknown benchmark. Pass one of {', '.join(NAMES)}.")
    path = make_folder(out) / f"{name}.json"
    part = measure(name, quick, lambda part: write_json(path, part))
    write_json(path, part)
    result = f"not run: {part['skipped']}" if "skipped" in part else f"{len(part['rows'])} rows"
    console.print(f"info: {name}: {result}")


def marked_text(path: Path) -> str:
    """Read a Markdown file with tables to update.

    Raises:
        InputError: the file does not exist or has no markers.
    """
    if not path.is_file():
        raise InputError(f"--readme {path}: no such file")
    text = path.read_text(encoding="utf-8")
    if not MARKED.search(text):
        raise InputError(
            f"--readme {path}: has no table between <!-- bench NAME --> and <!-- end bench -->"
        )
    return text


def renew_tables(path: Path, parts: dict[str, dict[str, Any]]) -> None:
    """Replace the tables between the markers of a Markdown file.

    Tables of benchmarks that did not run stay.

    Raises:
        InputError: the file does not exist or has no markers.
    """
    text = marked_text(path)

    def replacement(match: re.Match[str]) -> str:
        part = parts.get(match["name"], {})
        if "rows" not in part:
            return match[0]
        source = f"Measured on {describe_machine(part['machine'])}"
        if match["name"] in COUNTED:
            source = f"Compiled by jax {part['machine'].get('jax', '?')}, not run"
        return f"{match['open']}\n{markdown(part['rows'])}\n{source}.\n{match['close']}"

    with atomic(path) as temporary:
        temporary.write_text(MARKED.sub(replacement, text), encoding="utf-8")


def require_quiet(parts: dict[str, dict[str, Any]]) -> None:
    """Check that the times are reliable.

    Raises:
        InputError: the processors were busy when a benchmark started, or the times of one variant
            differ too much.
    """
    remedy = "Measure again on an idle machine, or pass --even-busy."
    for name, part in parts.items():
        if name in COUNTED or "rows" not in part:
            continue
        if (busy := part.get("others", 0)) > MAX_OTHERS:
            raise InputError(f"{name}: other processes used {busy:.0%} of the processors. {remedy}")
        if (spread := max(spreads(part["rows"]), default=1)) > MAX_SPREAD:
            raise InputError(
                f"{name}: the times of one variant differ by a factor of {spread:.2f}. {remedy}"
            )


def main(options: Config) -> None:
    if options.readme:
        marked_text(Path(options.readme))  # fail before the measurements
    if options.tables_only:
        make_folder(options.out)
    elif options.only:
        run_one(options.only, options.quick, options.out)
    else:
        failed = [name for name in NAMES if not _run_in_process(name, options)]
        if failed:
            write_tables(options.out)
            raise InputError(f"{', '.join(failed)}: failed, see above. The tables have the rest.")
    print(write_tables(options.out).read_text())
    if options.readme:
        parts = read_json(options.out / "bench.json")
        if not options.even_busy:
            require_quiet(parts)
        renew_tables(Path(options.readme), parts)


def _run_in_process(name: str, options: Config) -> bool:
    console.print(f"info: running {name}")
    command = [sys.executable, "-m", "experiments.bench", "--only", name, "--out", str(options.out)]
    done = subprocess.run(
        [*command, *(["--quick"] if options.quick else [])], stdout=subprocess.DEVNULL
    )
    return done.returncode == 0


if __name__ == "__main__":
    run_command(
        lambda: main(parse_options(Config, description=__doc__, prog="python -m experiments.bench"))
    )
