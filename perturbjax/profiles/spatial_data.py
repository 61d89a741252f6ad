"""Write cells as SpatialData (`.zarr`): images and masks of all sites, and a table of features.

Format: https://spatialdata.scverse.org. Elements of a site are named SITE_image and SITE_labels;
characters other than letters, digits, `_`, `-` and `.` of the `site_id` become `_`. Each row of the
table refers to its cell by `region` (the labels element) and `instance_id` (the label in the mask).
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from perturbjax.core.errors import InputError
from perturbjax.core.progress import track
from perturbjax.dataset import Dataset

#: Suffix of a SpatialData store, which is a folder.
ZARR = ".zarr"
#: Columns of the table that refer to a cell.
REGION, INSTANCE = "region", "instance_id"


def require_spatialdata() -> None:
    """Check that spatialdata is installed.

    Raises:
        InputError: It is not.
    """
    try:
        import spatialdata  # noqa: F401
    except ImportError as error:
        raise InputError(
            "--out: .zarr needs spatialdata, which is not installed. Run `pip install "
            "'perturbjax[spatialdata]'`."
        ) from error


def write_spatialdata(path: Path, dataset: Dataset, table: Any) -> None:
    """Write the sites of a dataset and the table of their cells.

    One site at a time is in memory. The store appears when it is complete.

    Args:
        path: folder to write, which must not exist.
        dataset: sites.
        table: AnnData of the cells, with `Metadata_site_id` and `Metadata_ObjectNumber` in `obs`.

    Raises:
        InputError: two sites have the same name after the replacement of characters.
    """
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, Labels2DModel, TableModel

    sites = list(dataset.index["site_id"].astype(str))
    names = dict(zip(sites, _element_names(sites), strict=True))
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{ZARR}")
    try:
        store = SpatialData()
        store.write(temporary)
        order = track(enumerate(sites), total=len(sites), label="Writing sites", unit="sites")
        for position, site in order:
            image, mask = dataset.pixels(position)
            elements = {
                f"{names[site]}_image": Image2DModel.parse(
                    np.moveaxis(image, 2, 0), dims=("c", "y", "x"), c_coords=dataset.channel_names
                ),
                f"{names[site]}_labels": Labels2DModel.parse(mask, dims=("y", "x")),
            }
            for name, element in elements.items():
                store[name] = element
                store.write_element(name)
                del store[name]  # only from memory
        regions = [f"{names[site]}_labels" for site in table.obs["Metadata_site_id"]]
        table.obs[REGION] = regions
        table.obs[REGION] = table.obs[REGION].astype("category")
        table.obs[INSTANCE] = table.obs["Metadata_ObjectNumber"].to_numpy(np.int64)
        store["cells"] = TableModel.parse(
            table, region=sorted(set(regions)), region_key=REGION, instance_key=INSTANCE
        )
        store.write_element("cells")
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _element_names(sites: list[str]) -> list[str]:
    names = [re.sub(r"[^A-Za-z0-9_.-]", "_", site) for site in sites]
    # Names of files that differ only in case are the same on some systems.
    lower = [name.lower() for name in names]
    for number, name in enumerate(lower):
        if (first := lower.index(name)) < number:
            raise InputError(
                f"--out: sites {sites[first]!r} and {sites[number]!r} have the same name in "
                "SpatialData. Write .h5ad instead."
            )
    return names
