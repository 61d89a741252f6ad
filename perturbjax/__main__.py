"""`python -m perturbjax VERB`: the `perturbjax` command."""

import sys
from pathlib import Path

# Python begins its search in the folder it is called from, where a user may well have a `data_prep` of their own.
if sys.path and not Path(__file__).is_relative_to(Path(sys.path[0]).absolute()):
    del sys.path[0]

from perturbjax.cli import main

if __name__ == "__main__":
    main()
