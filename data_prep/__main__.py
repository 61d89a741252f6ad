"""`python -m data_prep VERB`: inspect, build, simulate, fetch."""

from __future__ import annotations

from perturbjax.console import run_command


def main() -> None:
    """Run one verb; Ctrl-C is answered in one line from the first import on."""
    run_command(_run)


def _run() -> None:
    from typing import Annotated, Union

    import tyro
    from tyro.conf import subcommand

    from data_prep.build import BuildOptions, build
    from data_prep.fetch import FetchOptions, fetch
    from data_prep.inspection import InspectOptions, inspect
    from data_prep.simulate import SimulateOptions, simulate

    verbs = {
        "inspect": (InspectOptions, inspect),
        "build": (BuildOptions, build),
        "simulate": (SimulateOptions, simulate),
        "fetch": (FetchOptions, fetch),
    }
    named = tuple(Annotated[kind, subcommand(verb, prefix_name=False)] for verb, (kind, _) in verbs.items())
    options = tyro.cli(Union[named], prog="python -m data_prep", description=__doc__)  # noqa: UP007
    dict(verbs.values())[type(options)](options)


if __name__ == "__main__":
    main()
