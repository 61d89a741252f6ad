"""Reading tables as text."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from perturbjax.console import InputError

#: What an empty perturbation stands for: the wells that got the solvent only.
SOLVENT = "DMSO"


def read_table(path: Path, sep: str = ",") -> pd.DataFrame:
    """A CSV or TSV with every cell as text; empty cells are empty text.

    Raises:
        InputError: it is missing, empty, or cannot be parsed.
    """
    try:
        table = pd.read_csv(path, sep=sep, dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{path}: is empty; it needs a header and one row per site") from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a table ({error})") from error
    table.columns = table.columns.str.strip()
    if table.empty:
        raise InputError(f"{path}: has a header but no rows")
    return table.apply(lambda column: column.fillna("").str.strip())
