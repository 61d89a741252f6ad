"""`python -m tests.faults`: try to break every command, and say how each case ended.

`--only` takes storms by name. Ends with status 1 if anything ended otherwise than right, refused in one line, or killed
and then finished as if nothing had happened.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import pandas as pd

from experiments.bench.tables import markdown
from tests.faults import files, kills, oddities
from tests.faults.arena import Arena
from tests.faults.material import Material
from tests.faults.outcomes import GOOD, Finding, summary

#: Cases of a subject in one part: parts are what processes share.
PART = 60
Storm = Callable[[Arena, Path], Iterator[Finding]]


@dataclass(frozen=True)
class Config:
    """What is tried, and how often."""

    mutations: int = 2100
    """Damaged files, over all subjects; the quicker a subject, the more of them it gets."""
    kills: int = 210
    """Commands killed, interrupted or terminated at random instants."""
    seed: int = 0
    """Of all that is random."""
    only: str = ""
    """Only storms in whose name this regular expression is found."""
    processes: int = 2
    """Commands at once."""
    out: Path | None = None
    """CSV of every case."""


def main(options: Config) -> int:
    """Run the storms, print their table, and say whether all ended well."""
    started = time.monotonic()
    found = run(options)
    if options.out is not None:
        pd.DataFrame([vars(one) for one in found]).to_csv(options.out, index=False)
    print(markdown(summary(found)) if found else "nothing was tried")
    minutes, used = (time.monotonic() - started) / 60, os.times()
    processor = (used.children_user + used.children_system) / 60
    print(
        f"{len(found)} cases in {minutes:.1f} minutes, {processor:.1f} of a processor, {options.processes} at once"
    )
    bad = [one for one in found if one.outcome not in GOOD]
    for one in bad:
        print(f"{one.outcome}: {one.storm}, {one.case}, {one.file}: {one.said[:200]}")
    return int(bool(bad))


def run(options: Config) -> list[Finding]:
    """Every case of the storms that were asked for."""
    with tempfile.TemporaryDirectory(prefix="storm-") as folder, ExitStack() as stack:
        arenas: SimpleQueue[Arena] = SimpleQueue()
        for _ in range(options.processes):
            arenas.put(stack.enter_context(Arena(Path(folder) / "cache")))
        first = arenas.get()
        made = Material(first, Path(folder) / "made")
        parts = plan(made.make() if options.processes > 1 else made, options)
        arenas.put(first)

        def one_part(number: int) -> list[Finding]:
            name, storm = parts[number]
            arena, place = arenas.get(), Path(folder) / f"part{number}"
            place.mkdir()
            found = []
            try:
                found.extend(storm(arena, place))
            except Exception as error:  # of the storm: the others go on, and it is told at the end
                found.append(Finding(name, "the storm itself", "", "traceback", repr(error), 0, 0))
            finally:
                arenas.put(arena)
                shutil.rmtree(place, ignore_errors=True)
            ended = ", ".join(
                f"{n} {outcome}" for outcome, n in Counter(one.outcome for one in found).items()
            )
            print(f"{name}: {ended}", file=sys.stderr, flush=True)
            for one in found:
                if one.outcome not in GOOD:
                    print(
                        f"  {one.outcome}: {one.case} {one.file}: {one.said[:200]}",
                        file=sys.stderr,
                        flush=True,
                    )
            return found

        with ThreadPoolExecutor(options.processes) as threads:
            return [one for part in threads.map(one_part, range(len(parts))) for one in part]


def plan(made: Material, options: Config) -> list[tuple[str, Storm]]:
    """The storms that were asked for, by name, the longest first."""
    parts: list[tuple[str, Storm]] = []
    targets = kills.targets(made) if options.kills else []
    for target in targets:
        share = -(-options.kills // len(targets))
        parts.append((target.name, partial(_kill, target=target, count=share, seed=options.seed)))
    for oddity in oddities.oddities():
        parts.append((oddity.name, partial(_odd, oddity=oddity, made=made)))
    tried = [
        subject
        for subject in files.subjects(made)
        if options.mutations and re.search(options.only, subject.name)
    ]
    shares = {subject.name: subject.cost**-0.75 for subject in tried}
    for subject in tried:
        subject.source()  # before several processes ask for it at once
        count = max(round(options.mutations * shares[subject.name] / sum(shares.values())), 1)
        for start in range(0, count, PART):
            damage = partial(
                _damage, subject=subject, count=min(PART, count - start), seed=options.seed + start
            )
            parts.append((subject.name, damage))
    return [(name, storm) for name, storm in parts if re.search(options.only, name)]


def _damage(
    arena: Arena, place: Path, *, subject: files.Subject, count: int, seed: int
) -> Iterator[Finding]:
    return files.storm(arena, subject, place, count, seed)


def _kill(
    arena: Arena, place: Path, *, target: kills.Target, count: int, seed: int
) -> Iterator[Finding]:
    return kills.storm(arena, target, place, count, seed)


def _odd(
    arena: Arena, place: Path, *, oddity: oddities.Oddity, made: Material
) -> Iterator[Finding]:
    return oddity.run(arena, made, place)


if __name__ == "__main__":
    sys.exit(main(parse_options(Config, description=__doc__)))
