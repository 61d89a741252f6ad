"""Aggregate large parquet tables of single cells to wells in bounded memory.

The median of a well needs all of its cells, which can be in any row group. A parquet file stores
columns separately, so blocks of columns are read for all row groups and aggregated one after the
other. The result is exact, and memory depends on the number of rows but not of features.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from perturbjax.core.text_tables import clean_columns
from perturbjax.dataset import PLATE, WELL
from perturbjax.profiles.profile_table import METADATA, SITE_ID

#: Tables with more rows are aggregated by blocks of columns.
MAX_ROWS = 50_000
#: Values of one block of columns.
BLOCK_VALUES = 8_000_000
#: Column with the number of cells of a well.
CELL_COUNT = f"{METADATA}Count_Cells"


def is_large_cell_table(path: Path) -> bool:
    """Whether a parquet file has so many rows that it should be read by blocks of columns.

    Args:
        path: existing parquet file; False for a file that is not parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix.lower() not in (".parquet", ".pq"):
        return False
    try:
        return pq.read_metadata(path).num_rows > MAX_ROWS
    except (pa.ArrowInvalid, OSError):
        return False  # the ordinary reader gives the error message


def read_wells(path: Path, how: str) -> pd.DataFrame:
    """Aggregate the rows of each well of a parquet table.

    Args:
        path: table with `Metadata_Plate` and `Metadata_Well`.
        how: "median" or "mean"; missing and infinite values are ignored.

    Returns:
        One row per well, in order of first occurrence: metadata that have one value in each well,
        `Metadata_Count_Cells` (number of rows), and all numeric columns.
    """
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path, page_checksum_verification=True)
    schema = {name.strip(): file.schema_arrow.field(name).type for name in file.schema_arrow.names}
    text = [name for name in schema if name.startswith(METADATA)]
    metadata, _ = clean_columns(file.read(columns=text).to_pandas())
    codes, wells = pd.factorize(pd.MultiIndex.from_frame(metadata[[PLATE, WELL]]))
    grouped = metadata.groupby(codes, sort=True)
    same = (grouped.nunique() <= 1).all()
    table = grouped.first()[list(same.index[same])]
    table[CELL_COUNT] = np.bincount(codes, minlength=len(wells))
    numbers = ("float", "double", "int", "uint")
    others = {*text, SITE_ID}
    numeric = [n for n, kind in schema.items() if n not in others and str(kind).startswith(numbers)]
    width = max(1, BLOCK_VALUES // max(len(metadata), 1))
    parts = [table.astype({CELL_COUNT: str})]
    for start in range(0, len(numeric), width):
        block = file.read(columns=numeric[start : start + width]).to_pandas().astype(np.float32)
        block = block.where(np.isfinite(block))
        parts.append(block.groupby(codes, sort=True).agg(how))
    return pd.concat(parts, axis=1).reset_index(drop=True)
