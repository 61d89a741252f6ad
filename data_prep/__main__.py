"""`python -m data_prep VERB`: what `perturbjax VERB` does for inspect, build, simulate and fetch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from perturbjax import help
from perturbjax.console import InputError, parse_options, run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and leave with its exit status; Ctrl-C is answered in one line from the first import on."""
    run_command(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def verbs() -> dict[str, tuple[type, Callable[[Any], object]]]:
    """Verb → its options, and what runs with them. Imported here: worker processes import this module too."""
    from data_prep.build import BuildConfig, build
    from data_prep.fetch import FetchConfig, fetch
    from data_prep.inspection import InspectConfig, inspect
    from data_prep.simulate import SimulateConfig, simulate

    return {
        "inspect": (InspectConfig, inspect),
        "build": (BuildConfig, build),
        "simulate": (SimulateConfig, simulate),
        "fetch": (FetchConfig, fetch),
    }


def _run(argv: list[str]) -> None:
    verb, *words = argv or ["--help"]
    if verb in help.ASKED:
        print("usage: python -m data_prep VERB [options]    (or: perturbjax VERB)\n")
        print(help.listed({name: (options.__doc__ or "").splitlines()[0] for name, (options, _) in verbs().items()}))
        return
    if verb not in verbs():
        raise InputError(f"data_prep {verb}: unknown; choose one of {', '.join(verbs())}")
    import tyro

    options, run = verbs()[verb]
    if asked := set(words) & set(help.ASKED):
        print(
            help.render(options, f"perturbjax {verb}", options.__doc__ or "", everything="--help-all" in asked), end=""
        )
        return
    run(parse_options(options, words, prog=f"python -m data_prep {verb}", config=(tyro.conf.OmitArgPrefixes,)))


if __name__ == "__main__":
    main()
