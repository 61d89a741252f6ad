"""Write features with their metadata, part by part: parquet, or AnnData (`.h5ad`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float32

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic
from perturbjax.dataset import PLATE, WELL

Level = Literal["site", "well"]
Parts = Sequence[Float32[np.ndarray, "_n _d"]]
#: Key of the provenance of the features in the file.
PROVENANCE_KEY = "perturbjax"


def write_features(
    path: Path,
    level: Level,
    index: pd.DataFrame,
    parts: Parts,
    names: list[str],
    facts: dict[str, Any],
) -> int:
    """Write the features of a dataset, in the order of its index.

    Args:
        path: `.h5ad` for AnnData, else parquet.
        level: "site", or "well" for the mean of the sites of each well.
        index: index of the dataset.
        parts: features of consecutive records; they may be memory maps and are read one after the
            other.
        names: names of the features.
        facts: provenance, as JSON values.

    Returns:
        Number of rows.
    """
    columns = [column for column in index.columns if column.startswith("Metadata_")]
    metadata = index[columns].assign(Metadata_site_id=index["site_id"]).reset_index(drop=True)
    if level == "well":
        metadata, parts = average_wells(metadata, parts)
    write = _write_anndata if path.suffix == ".h5ad" else _write_parquet
    with atomic(path) as temporary:
        write(temporary, metadata, parts, names, facts)
    return len(metadata)


def average_wells(metadata: pd.DataFrame, parts: Parts) -> tuple[pd.DataFrame, Parts]:
    """Average the sites of each well, in order of first occurrence.

    Metadata that differ within a well are left out; `Metadata_Site_Count` is added.
    """
    # Keys as arrays, so that both columns stay in the groups.
    groups = metadata.groupby([metadata[PLATE].to_numpy(), metadata[WELL].to_numpy()], sort=False)
    well = groups.ngroup().to_numpy()
    counts = np.bincount(well)
    sums, start = np.zeros((len(counts), parts[0].shape[1])), 0
    for part in parts:
        # The sites of a well can be in several parts.
        np.add.at(sums, well[start : start + len(part)], part)
        start += len(part)
    same = (groups.nunique(dropna=False) <= 1).all()
    first = np.unique(well, return_index=True)[1]
    wells = metadata.loc[first, same.index[same]].reset_index(drop=True)
    return wells.assign(Metadata_Site_Count=counts), [(sums / counts[:, None]).astype(np.float32)]


def _write_parquet(
    path: Path, metadata: pd.DataFrame, parts: Parts, names: list[str], facts: dict[str, Any]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer, start = None, 0
    try:
        for part in parts:
            left = pa.Table.from_pandas(
                metadata.iloc[start : start + len(part)], preserve_index=False
            )
            start += len(part)
            columns = [pa.array(np.ascontiguousarray(column)) for column in np.asarray(part).T]
            table = pa.table([*left.columns, *columns], names=[*left.column_names, *names])
            table = table.replace_schema_metadata({PROVENANCE_KEY: json.dumps(facts)})
            # The first part determines the schema of the file.
            writer = writer or pq.ParquetWriter(path, table.schema, write_page_checksum=True)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def require_anndata(flag: str) -> None:
    """Check that anndata is installed.

    Args:
        flag: flag that names the `.h5ad` file, for the message.

    Raises:
        InputError: It is not.
    """
    try:
        import anndata  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{flag}: .h5ad needs anndata, which is not installed. Run `pip install "
            "'perturbjax[anndata]'`."
        ) from error


def _write_anndata(
    path: Path, metadata: pd.DataFrame, parts: Parts, names: list[str], facts: dict[str, Any]
) -> None:
    import anndata

    # AnnData takes one array: a memory-mapped file keeps memory independent of the number of rows.
    gathered = path.with_suffix(".npy")
    try:
        shape = (len(metadata), len(names))
        values = np.lib.format.open_memmap(gathered, mode="w+", dtype=np.float32, shape=shape)
        np.concatenate(parts, out=values)
        text = {column: str for column in metadata if metadata[column].dtype == object}
        rows = metadata.astype(text).set_axis(metadata.index.astype(str))
        table = anndata.AnnData(np.asarray(values), obs=rows, var=pd.DataFrame(index=names))
        table.uns[PROVENANCE_KEY] = json.dumps(facts)
        table.write_h5ad(path)
    finally:
        gathered.unlink(missing_ok=True)
