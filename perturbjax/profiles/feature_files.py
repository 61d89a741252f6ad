"""Writing features with their metadata, a part at a time: parquet, or AnnData's .h5ad."""

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
#: Under which key the provenance of the features stands in the file.
PROVENANCE_KEY = "perturbjax"


def write(
    path: Path,
    level: Level,
    index: pd.DataFrame,
    parts: Parts,
    names: list[str],
    facts: dict[str, Any],
) -> int:
    """Write the features of an index's records, in order, and return the number of rows.

    Args:
        path: its suffix decides: .h5ad is AnnData's, else parquet.
        parts: the features of consecutive records; they may be memory maps, and are read one after the other.
        names: of the features.
        facts: how they came about, as plain values.
    """
    columns = [column for column in index.columns if column.startswith("Metadata_")]
    metadata = index[columns].assign(Metadata_site_id=index["site_id"]).reset_index(drop=True)
    if level == "well":
        metadata, parts = well_means(metadata, parts)
    with atomic(path) as temporary:
        (_write_anndata if path.suffix == ".h5ad" else _write_parquet)(
            temporary, metadata, parts, names, facts
        )
    return len(metadata)


def well_means(metadata: pd.DataFrame, parts: Parts) -> tuple[pd.DataFrame, Parts]:
    """The mean of each well's sites, in the order in which wells first occur.

    Metadata that differ between the sites of a well are left out; `Metadata_Site_Count` is added.
    """
    keys = [
        metadata[PLATE].to_numpy(),
        metadata[WELL].to_numpy(),
    ]  # as arrays, so that the two columns stay
    groups = metadata.groupby(keys, sort=False)
    well = groups.ngroup().to_numpy()
    counts = np.bincount(well)
    sums, start = np.zeros((len(counts), parts[0].shape[1])), 0
    for part in parts:
        np.add.at(sums, well[start : start + len(part)], part)
        start += len(part)
    same = (groups.nunique(dropna=False) <= 1).all()
    wells = metadata.loc[np.unique(well, return_index=True)[1], same.index[same]].reset_index(
        drop=True
    )
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
            writer = writer or pq.ParquetWriter(path, table.schema, write_page_checksum=True)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def require_anndata() -> None:
    """Raises:
    InputError: anndata is not installed.
    """
    try:
        import anndata  # noqa: F401
    except ImportError as error:
        raise InputError(
            "--out: .h5ad needs anndata; run `pip install 'perturbjax[anndata]'`"
        ) from error


def _write_anndata(
    path: Path, metadata: pd.DataFrame, parts: Parts, names: list[str], facts: dict[str, Any]
) -> None:
    import anndata

    # Gathered in a file of its own, so that memory does not grow with the number of rows.
    gathered = path.with_suffix(".npy")
    try:
        shape = (len(metadata), len(names))
        values = np.lib.format.open_memmap(gathered, mode="w+", dtype=np.float32, shape=shape)
        np.concatenate(parts, out=values)
        rows = metadata.astype({c: str for c in metadata if metadata[c].dtype == object}).set_axis(
            metadata.index.astype(str)
        )
        table = anndata.AnnData(np.asarray(values), obs=rows, var=pd.DataFrame(index=names))
        table.uns[PROVENANCE_KEY] = json.dumps(facts)
        table.write_h5ad(path)
    finally:
        gathered.unlink(missing_ok=True)
