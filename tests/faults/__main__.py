"""Run the fault-injection tests at length and print a table of outcomes.

    python -m tests.faults [--only NAME] [--out cases.csv]

The exit status is 1 if a case has another outcome than "correct", "refused" (one line of error) or
"killed" (with a correct result after the restart).
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
from pathlib import Path
from queue import SimpleQueue

import pandas as pd

from experiments.bench.tables import markdown
from perturbjax.cli.parsing import parse_options
from tests.faults.arena import CommandServer
from tests.faults.files import damage_suites, run_damage_cases
from tests.faults.kills import kill_suites, run_kill_cases
from tests.faults.material import Material
from tests.faults.oddities import environment_suites
from tests.faults.outcomes import ALLOWED, Finding, summarize

#: Number of damaged files in one job; jobs are distributed over the command servers.
JOB_SIZE = 60
Job = Callable[[CommandServer, Path], Iterator[Finding]]


@dataclass(frozen=True)
class Config:
    """Number and selection of fault-injection cases."""

    mutations: int = 2100
    """Number of damaged files over all suites; fast suites get more of them."""
    kills: int = 210
    """Number of commands killed, interrupted or terminated at random times."""
    seed: int = 0
    """Random seed."""
    only: str = ""
    """Regular expression; run only suites whose name matches."""
    processes: int = 2
    """Number of commands that run at the same time."""
    out: Path | None = None
    """CSV file with all cases."""


def main(options: Config) -> int:
    """Run the suites, print the table, and return the exit status."""
    start = time.monotonic()
    findings = run_suites(options)
    if options.out is not None:
        pd.DataFrame([vars(one) for one in findings]).to_csv(options.out, index=False)
    print(markdown(summarize(findings)) if findings else f"no suite matches --only {options.only}")
    minutes, usage = (time.monotonic() - start) / 60, os.times()
    cpu = (usage.children_user + usage.children_system) / 60
    print(
        f"{len(findings)} cases in {minutes:.1f} minutes ({cpu:.1f} CPU minutes, "
        f"{options.processes} processes)"
    )
    failures = [one for one in findings if one.outcome not in ALLOWED]
    for one in failures:
        print(f"{one.outcome}: {one.suite}, {one.case}, {one.file}: {one.message[:200]}")
    return int(bool(failures))


def run_suites(options: Config) -> list[Finding]:
    """Run all selected suites and return their cases."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, ExitStack() as stack:
        servers: SimpleQueue[CommandServer] = SimpleQueue()
        for _ in range(options.processes):
            servers.put(stack.enter_context(CommandServer(Path(folder) / "cache")))
        server = servers.get()
        material = Material(server, Path(folder) / "material")
        jobs = list_jobs(material.make_all() if options.processes > 1 else material, options)
        servers.put(server)

        def run_job(number: int) -> list[Finding]:
            name, job = jobs[number]
            server, root = servers.get(), Path(folder) / f"job{number}"
            root.mkdir()
            findings = []
            try:
                findings.extend(job(server, root))
            except Exception as error:  # of the suite itself; reported with the findings
                findings.append(Finding(name, "suite failed", "", "traceback", repr(error), 0, 0))
            finally:
                servers.put(server)
                shutil.rmtree(root, ignore_errors=True)
            counts = Counter(one.outcome for one in findings)
            text = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
            print(f"{name}: {text}", file=sys.stderr, flush=True)
            return findings

        with ThreadPoolExecutor(options.processes) as threads:
            return [one for job in threads.map(run_job, range(len(jobs))) for one in job]


def list_jobs(material: Material, options: Config) -> list[tuple[str, Job]]:
    """Return the selected jobs with their names, the longest first."""
    jobs: list[tuple[str, Job]] = []
    kills = kill_suites(material) if options.kills else []
    for suite in kills:
        count = -(-options.kills // len(kills))
        jobs.append(
            (suite.name, lambda s, r, u=suite, n=count: run_kill_cases(s, u, r, n, options.seed))
        )
    for name, run in environment_suites().items():
        jobs.append((name, lambda s, r, run=run: run(s, material, r)))
    damaged = [
        suite
        for suite in damage_suites(material)
        if options.mutations and re.search(options.only, suite.name)
    ]
    weights = {suite.name: suite.cost**-0.75 for suite in damaged}
    for suite in damaged:
        suite.source()  # create it before several threads need it
        fraction = weights[suite.name] / sum(weights.values())
        count = max(round(options.mutations * fraction), 1)
        for start in range(0, count, JOB_SIZE):
            size, seed = min(JOB_SIZE, count - start), options.seed + start
            jobs.append(
                (suite.name, lambda s, r, u=suite, n=size, k=seed: run_damage_cases(s, u, r, n, k))
            )
    return [(name, job) for name, job in jobs if re.search(options.only, name)]


if __name__ == "__main__":
    sys.exit(main(parse_options(Config, description=__doc__)))
