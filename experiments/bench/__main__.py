"""Run the benchmarks that this machine allows, and write one table of them.

    python -m experiments.bench --out DIR [--quick] [--only step] [--readme docs/performance.md]

Each benchmark is a module beside this one with `run(quick) -> rows`, or one that yields the rows so far. It runs in a
process of its own, since JAX and torch each take a whole accelerator, and leaves `DIR/NAME.json`; `bench.md` and
`bench.json` are made of all of them.
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
    machine,
    markdown,
    others_busy,
    page,
    spreads,
    where,
)
from perturbjax.cli import parse_options
from perturbjax.core.errors import InputError, run_command
from perturbjax.core.files import atomic, make_folder, read_json, write_json
from perturbjax.core.messages import console
from perturbjax.core.options import require_sound

#: Modules beside the benchmarks that are none.
HELPERS = ("__main__", "commands", "hlo", "mosaic", "tables")
NAMES = tuple(m.name for m in pkgutil.iter_modules(bench.__path__) if m.name not in HELPERS)
#: Benchmarks that count what a compiler says, and measure no time.
COUNTED = ("aot",)
#: Share of the processors that others may use, and how far apart (greatest over least) the times of one way may lie.
MOST_OTHERS, WIDEST = 0.1, 1.5
MARKED = re.compile(
    r"(?P<open><!-- bench (?P<name>\w+) -->)\n.*?(?P<close><!-- end bench -->)", re.DOTALL
)


@dataclass(frozen=True)
class Config:
    """Measure speed, and write a table."""

    out: Path
    """Folder to write NAME.json, bench.json and bench.md to."""
    quick: bool = False
    """Fewer repeats and smaller sizes: to see that everything runs, not to quote."""
    only: str = ""
    """Run this benchmark alone; empty runs all."""
    tables_only: bool = False
    """Run nothing: make the tables of what --out holds."""
    readme: str = ""
    """Markdown file whose tables are renewed: what stands between <!-- bench NAME --> and <!-- end bench -->. Times
    that were measured on a busy machine are refused."""
    even_busy: bool = False
    """Renew tables with times that were measured beside other work all the same."""

    def __post_init__(self) -> None:
        require_sound(self)


def measure(name: str, quick: bool, save: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """One benchmark's rows with what they were measured on; or the reason why it cannot run here.

    A benchmark that yields its rows so far has them saved each time.
    """
    part: dict[str, Any] = {
        "about": "",
        "machine": machine(),
        "quick": quick,
        "others": others_busy(),
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
    """Gather every `NAME.json` of a folder into `bench.json` and `bench.md`."""
    parts = {
        name: read_json(out / f"{name}.json") for name in NAMES if (out / f"{name}.json").is_file()
    }
    write_json(out / "bench.json", parts)
    with atomic(out / "bench.md") as temporary:
        temporary.write_text(page(parts))
    return out / "bench.md"


def run_one(name: str, quick: bool, out: Path) -> None:
    """Measure one benchmark in this process.

    Raises:
        InputError: there is none of that name.
    """
    if name not in NAMES:
        raise InputError(
            f"--only {name}: no such benchmark; choose one of {', '.join(NAMES) or '(none exist)'}"
        )
    path = make_folder(out) / f"{name}.json"
    part = measure(name, quick, lambda part: write_json(path, part))
    write_json(path, part)
    console.print(
        f"{name}: "
        + (f"not run here: {part['skipped']}" if "skipped" in part else f"{len(part['rows'])} rows")
    )


def marked_text(path: Path) -> str:
    """The text of a Markdown file that has tables to renew.

    Raises:
        InputError: the file is not there, or has no marker.
    """
    if not path.is_file():
        raise InputError(f"--readme {path}: no such file")
    text = path.read_text(encoding="utf-8")
    if not MARKED.search(text):
        raise InputError(
            f"--readme {path}: nothing between <!-- bench NAME --> and <!-- end bench --> to renew"
        )
    return text


def renew_tables(path: Path, parts: dict[str, dict[str, Any]]) -> None:
    """Put the measured rows between a Markdown file's markers; a benchmark that did not run keeps its old ones.

    Raises:
        InputError: the file is not there, or has no marker.
    """
    text = marked_text(path)

    def renewed(found: re.Match[str]) -> str:
        part = parts.get(found["name"], {})
        if "rows" not in part:
            return found[0]
        told = f"Compiled by jax {part['machine'].get('jax', '?')}, nothing was run"
        told = told if found["name"] in COUNTED else f"Measured on {where(part['machine'])}"
        return f"{found['open']}\n{markdown(part['rows'])}\n{told}.\n{found['close']}"

    with atomic(path) as temporary:
        temporary.write_text(MARKED.sub(renewed, text), encoding="utf-8")


def require_quiet(parts: dict[str, dict[str, Any]]) -> None:
    """Say whose times cannot be trusted.

    Raises:
        InputError: a benchmark started beside other work, or one way's times lie far apart.
    """
    for name, part in parts.items():
        if name in COUNTED or "rows" not in part:
            continue
        if part.get("others", 0) > MOST_OTHERS:
            raise InputError(
                f"{name}: {part['others']:.0%} of the processors were busy with other work when it started; "
                "measure again on a quiet machine, or give --even-busy"
            )
        if (widest := max(spreads(part["rows"]), default=1)) > WIDEST:
            raise InputError(
                f"{name}: the times of one way lie {widest:.2f} to 1 apart; measure again on a quiet machine, or give "
                "--even-busy"
            )


def main(options: Config) -> None:
    if options.readme:
        marked_text(Path(options.readme))  # said now, not after all has been measured
    if options.tables_only:
        make_folder(options.out)
    elif options.only:
        run_one(options.only, options.quick, options.out)
    else:
        failed = [name for name in NAMES if not _run_apart(name, options)]
        if failed:
            write_tables(options.out)
            raise InputError(f"{', '.join(failed)}: failed, see above; the table holds the others")
    print(write_tables(options.out).read_text())
    if options.readme:
        parts = read_json(options.out / "bench.json")
        if not options.even_busy:
            require_quiet(parts)
        renew_tables(Path(options.readme), parts)


def _run_apart(name: str, options: Config) -> bool:
    console.print(f"{name} …")
    command = [sys.executable, "-m", "experiments.bench", "--only", name, "--out", str(options.out)]
    done = subprocess.run(
        [*command, *(["--quick"] if options.quick else [])], stdout=subprocess.DEVNULL
    )
    return done.returncode == 0


if __name__ == "__main__":
    run_command(
        lambda: main(parse_options(Config, description=__doc__, prog="python -m experiments.bench"))
    )
