"""`python -m tests.storms`: try to break every command, and say how each case ended.

`--seconds` bounds each half; `--only` takes storms by name. Ends with status 1 if anything ended otherwise than right,
refused in one line, or killed and then finished as if nothing had happened.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

from experiments.bench.tables import markdown
from tests.storms import files, kills, oddities
from tests.storms.arena import GOOD, Arena
from tests.storms.files import Finding
from tests.storms.material import Material, make_material

OUTCOMES = (*GOOD, "traceback", "silently different", "hang", "memory", "executed")


@dataclass(frozen=True)
class Options:
    """What is tried, and how often."""

    mutations: int = 2000
    """Damaged files, over all subjects; the quicker a subject, the more of them it gets."""
    kills: int = 200
    """Commands killed, interrupted or terminated at random instants."""
    seed: int = 0
    """Of all that is random."""
    only: str = ""
    """Only storms whose name holds this."""
    processes: int = 2
    """Commands at once."""
    out: Path | None = None
    """CSV of every case."""


def main(options: Options) -> int:
    """Run the storms, print their table, and say whether all ended well."""
    with tempfile.TemporaryDirectory(prefix="storm-") as folder, Arena() as arena:
        root = Path(folder)
        made = make_material(arena, root)
        jobs = plan(made, options)
        with ThreadPoolExecutor(options.processes) as threads:
            found = [f for part in threads.map(lambda job: run(job, made, root), enumerate(jobs)) for f in part]
    table = pd.DataFrame([vars(finding) for finding in found])
    if options.out is not None:
        table.to_csv(options.out, index=False)
    print(markdown(summary(table)) if len(table) else "nothing was tried")
    bad = [finding for finding in found if finding.outcome not in GOOD]
    for finding in bad:
        print(f"{finding.outcome}: {finding.subject}, {finding.mutation}, {finding.file}: {finding.said[:200]}")
    return int(bool(bad))


def plan(made: Material, options: Options) -> list[tuple]:
    """(kind, subject, how many, seed), each subject in parts so that two processes share the work."""
    tried = [s for s in files.subjects(made) if options.only in s.name]
    shares = {s.name: 1 / max(s.cost, 0.3) ** 0.75 for s in tried}
    whole = sum(shares.values()) or 1.0
    jobs = []
    for subject in tried:
        count = max(round(options.mutations * shares[subject.name] / whole), 1)
        for part in range(0, count, 50):
            jobs.append(("files", subject, min(50, count - part), options.seed + part))
    targets = [t for t in kills.targets(made) if options.only in t.name]
    for target in targets:
        for part in range(0, -(-options.kills // max(len(targets), 1)), 8):
            jobs.append(("kills", target, 8, options.seed + part))
    jobs.extend(("oddities", oddity, 1, 0) for oddity in oddities.ODDITIES if options.only in oddity.name)
    return jobs


def run(job: tuple, made: Material, root: Path) -> list[Finding]:
    """One part of the storm, in a folder and a process of its own."""
    number, (kind, subject, count, seed) = job
    folder = root / f"job{number}"
    folder.mkdir()
    with Arena() as arena:
        storm = {"files": files.storm, "kills": kills.storm}.get(kind)
        found = list(storm(arena, subject, folder, count, seed) if storm else subject.run(arena, made, folder))
    ended = Counter(f.outcome for f in found)
    print(f"{subject.name}: {', '.join(f'{n} {o}' for o, n in ended.items())}", file=sys.stderr, flush=True)
    return found


def summary(table: pd.DataFrame) -> list[dict[str, object]]:
    """How often each outcome came, by storm and in all."""
    counted = pd.crosstab(table["subject"], table["outcome"]).reindex(columns=list(OUTCOMES), fill_value=0)
    counted.loc["all"] = counted.sum()
    return [{"storm": name, **row} for name, row in counted.to_dict("index").items()]


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
