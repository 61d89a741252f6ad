"""`python -m data_prep VERB`: inspect, build, simulate, fetch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Union

from perturbjax.console import parse_options, run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and leave with its exit status; Ctrl-C is answered in one line from the first import on."""
    run_command(lambda: _run(argv))


def verbs() -> dict[str, tuple[type, Callable[[Any], object]]]:
    """Verb → its options, and what runs with them. Imported here: worker processes import this module too."""
    from data_prep.build import BuildOptions, build
    from data_prep.fetch import FetchOptions, fetch
    from data_prep.inspection import InspectOptions, inspect
    from data_prep.simulate import SimulateOptions, simulate

    return {
        "inspect": (InspectOptions, inspect),
        "build": (BuildOptions, build),
        "simulate": (SimulateOptions, simulate),
        "fetch": (FetchOptions, fetch),
    }


def _run(argv: Sequence[str] | None) -> None:
    from tyro.conf import subcommand

    named = tuple(Annotated[kind, subcommand(verb, prefix_name=False)] for verb, (kind, _) in verbs().items())
    options: Any = parse_options(Union[named], argv, prog="python -m data_prep", description=__doc__)  # noqa: UP007
    dict(verbs().values())[type(options)](options)


if __name__ == "__main__":
    main()
