"""`python -m perturbjax COMMAND`: the `perturbjax` command."""

import sys
from pathlib import Path

# Python searches the current folder first, which may contain another package named data_prep.
if sys.path and not Path(__file__).is_relative_to(Path(sys.path[0]).absolute()):
    del sys.path[0]

from perturbjax.cli import main

if __name__ == "__main__":
    main()
