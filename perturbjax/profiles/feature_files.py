"""Write features with their metadata: parquet, CSV, AnnData (`.h5ad`) or SpatialData (`.zarr`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float32

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic
from perturbjax.dataset import PLATE, WELL, Dataset
from perturbjax.profiles.spatial_data import ZARR, write_spatialdata

Level = Literal["cell", "site", "well"]
Parts = Sequence[Float32[np.ndarray, "_n _d"]]
#: Key of the provenance of the features in the file.
PROVENANCE_KEY = "perturbjax"
#: Column with the id of a cell: `plate_well_site_object`.
CELL_ID = "Metadata_cell_id"
#: Columns with the centroid of a cell, in pixels from the upper left pixel of its site.
CENTER_X, CENTER_Y = "Metadata_Center_X", "Metadata_Center_Y"
#: Column with the name of each row in AnnData, best first.
ROW_NAMES = (CELL_ID, "Metadata_site_id")


def write_features(
    path: Path,
    level: Level,
    index: pd.DataFrame,
    parts: Parts,
    names: list[str],
    facts: dict[str, Any],
    cells: pd.DataFrame | None = None,
    dataset: Dataset | None = None,
) -> int:
    """Write the features of a dataset, in the order of its index.

    Args:
        path: `.h5ad` for AnnData, `.zarr` for SpatialData, `.csv`, else parquet.
        level: "cell", "site", or "well" for the mean of the sites of each well.
        index: index of the dataset.
        parts: features of consecutive records; they may be memory maps and are read one after the
            other.
        names: names of the features.
        facts: provenance, as JSON values.
        cells: for level "cell", one row for each row of the features, see
            `part_features.describe_cells`.
        dataset: images and masks for SpatialData.

    Returns:
        Number of rows.
    """
    columns = [column for column in index.columns if column.startswith("Metadata_")]
    metadata = index[columns].assign(Metadata_site_id=index["site_id"]).reset_index(drop=True)
    if cells is not None:
        metadata = cell_metadata(metadata, cells)
    if level == "well":
        metadata, parts = average_wells(metadata, parts)
    if path.suffix == ZARR and dataset is not None:
        with open_anndata(path, metadata, parts, names, facts) as table:
            write_spatialdata(path, dataset, table)
        return len(metadata)
    write = {".h5ad": _write_anndata, ".csv": _write_csv}.get(path.suffix, _write_parquet)
    with atomic(path) as temporary:
        write(temporary, metadata, parts, names, facts)
    return len(metadata)


def cell_metadata(sites: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Return the metadata of cells: those of their site, and five columns of the cell.

    `Metadata_cell_id` is unique: `plate_well_site_object`. `Metadata_Center_X`, `Metadata_Center_Y`
    (centroid) and `Metadata_Area` are in pixels.
    """
    metadata = sites.iloc[cells["position"]].reset_index(drop=True)
    objects = cells["object"].to_numpy()
    columns = {
        CELL_ID: metadata["Metadata_site_id"] + "_" + pd.Series(objects).astype(str),
        "Metadata_ObjectNumber": objects,
        CENTER_X: cells["center_x"].to_numpy(),
        CENTER_Y: cells["center_y"].to_numpy(),
        "Metadata_Area": cells["area"].to_numpy(),
    }
    return metadata.assign(**columns)


def average_wells(metadata: pd.DataFrame, parts: Parts) -> tuple[pd.DataFrame, Parts]:
    """Average the sites of each well, in order of first occurrence.

    Missing values are left out, such as those of sites without cells. Metadata that differ within a
    well are left out, too; `Metadata_Site_Count` is added.
    """
    # Keys as arrays, so that both columns stay in the groups.
    groups = metadata.groupby([metadata[PLATE].to_numpy(), metadata[WELL].to_numpy()], sort=False)
    well = groups.ngroup().to_numpy()
    counts = np.bincount(well)
    sums, start = np.zeros((len(counts), parts[0].shape[1])), 0
    present = np.zeros(sums.shape, np.int32)
    for part in parts:
        # The sites of a well can be in several parts.
        rows = well[start : start + len(part)]
        np.add.at(sums, rows, np.nan_to_num(part, nan=0.0))
        np.add.at(present, rows, ~np.isnan(part))
        start += len(part)
    same = (groups.nunique(dropna=False) <= 1).all()
    first = np.unique(well, return_index=True)[1]
    wells = metadata.loc[first, same.index[same]].reset_index(drop=True)
    mean = np.where(present > 0, sums / np.maximum(present, 1), np.nan).astype(np.float32)
    return wells.assign(Metadata_Site_Count=counts), [mean]


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


def _write_csv(
    path: Path, metadata: pd.DataFrame, parts: Parts, names: list[str], facts: dict[str, Any]
) -> None:
    """Write a text file, which has no place for the provenance."""
    start = 0
    for part in parts:
        left = metadata.iloc[start : start + len(part)].reset_index(drop=True)
        table = pd.concat([left, pd.DataFrame(np.asarray(part), columns=names)], axis=1)
        table.to_csv(path, mode="a", header=start == 0, index=False)
        start += len(part)


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
    with open_anndata(path, metadata, parts, names, facts) as table:
        table.write_h5ad(path)


@contextmanager
def open_anndata(
    path: Path, metadata: pd.DataFrame, parts: Parts, names: list[str], facts: dict[str, Any]
) -> Iterator[Any]:
    """Yield an AnnData table whose values are in a temporary file next to `path`.

    A memory-mapped file keeps memory independent of the number of rows.
    """
    import anndata

    gathered = path.with_suffix(".npy")
    try:
        shape = (len(metadata), len(names))
        values = np.lib.format.open_memmap(gathered, mode="w+", dtype=np.float32, shape=shape)
        np.concatenate(parts, out=values)
        text = {column: str for column in metadata if metadata[column].dtype == object}
        name = next((name for name in ROW_NAMES if name in metadata), None)
        row_names = metadata.index if name is None else metadata[name]
        rows = metadata.astype(text).set_axis(pd.Index(row_names.astype(str), name=None))
        table = anndata.AnnData(np.asarray(values), obs=rows, var=pd.DataFrame(index=names))
        if CENTER_X in metadata:
            table.obsm["spatial"] = metadata[[CENTER_X, CENTER_Y]].to_numpy(np.float32)
        table.uns[PROVENANCE_KEY] = json.dumps(facts)
        yield table
    finally:
        gathered.unlink(missing_ok=True)
