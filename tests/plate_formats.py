"""Write a simulated plate and its table in other image formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pandas as pd
import tifffile
import zarr
from imagecodecs import numcodecs as codecs

CHANNELS = ("DNA", "Actin", "Tubulin")
#: Channel order in multi-channel files; differs from the table on purpose.
WRITTEN = ("Tubulin", "DNA", "Actin")


def table_of(plate: Path) -> pd.DataFrame:
    return pd.read_csv(plate / "load_data.csv", dtype=str, keep_default_na=False)


def site_pixels(plate: Path, row: pd.Series) -> dict[str, np.ndarray]:
    return {
        c: tifffile.imread(plate / row[f"PathName_Orig{c}"] / row[f"FileName_Orig{c}"])
        for c in CHANNELS
    }


def site_name(row: pd.Series) -> str:
    return f"{row['Metadata_Plate']}_{row['Metadata_Well']}_{row['Metadata_Site']}"


def rewritten(
    plate: Path, out: Path, write: Callable[[Path, dict[str, np.ndarray]], dict[str, str]]
) -> Path:
    """Write all sites with `write(path without suffix, pixels)`, which returns channel → file."""
    table = table_of(plate)
    (out / "images").mkdir(parents=True)
    for index, row in table.iterrows():
        for channel, name in write(
            out / "images" / site_name(row), site_pixels(plate, row)
        ).items():
            table.loc[index, [f"FileName_Orig{channel}", f"PathName_Orig{channel}"]] = [
                name,
                "images",
            ]
    table.to_csv(out / "load_data.csv", index=False)
    return out


def as_ome_tiff(plate: Path, out: Path) -> Path:
    """Write one OME-TIFF per site with named channels."""

    def write(path: Path, pixels: dict[str, np.ndarray]) -> dict[str, str]:
        metadata = {"axes": "CYX", "Channel": {"Name": list(WRITTEN)}}
        image = np.stack([pixels[channel] for channel in WRITTEN])
        tifffile.imwrite(
            f"{path}.ome.tiff", image, ome=True, metadata=metadata, photometric="minisblack"
        )
        return dict.fromkeys(CHANNELS, f"{path.name}.ome.tiff")

    return rewritten(plate, out, write)


def as_ome_stack(plate: Path, out: Path) -> Path:
    """Write one OME-TIFF per site; the original is the middle of three planes."""

    def write(path: Path, pixels: dict[str, np.ndarray]) -> dict[str, str]:
        metadata = {"axes": "CZYX", "Channel": {"Name": list(WRITTEN)}}
        image = np.stack([np.stack([pixels[c] // 2, pixels[c], pixels[c] // 3]) for c in WRITTEN])
        tifffile.imwrite(
            f"{path}.ome.tiff", image, ome=True, metadata=metadata, photometric="minisblack"
        )
        return dict.fromkeys(CHANNELS, f"{path.name}.ome.tiff")

    return rewritten(plate, out, write)


def as_png(plate: Path, out: Path) -> Path:
    def write(path: Path, pixels: dict[str, np.ndarray]) -> dict[str, str]:
        for channel, image in pixels.items():
            Path(f"{path}_{channel}.png").write_bytes(imagecodecs.png_encode(image))
        return {channel: f"{path.name}_{channel}.png" for channel in pixels}

    return rewritten(plate, out, write)


def well_of(row: pd.Series) -> str:
    """Return the OME-Zarr group of a well: `A/1` for A01."""
    return f"{row['Metadata_Well'][0]}/{int(row['Metadata_Well'][1:])}"


def as_ome_zarr(plate: Path, out: Path, version: int = 3, table: bool = True) -> Path:
    """Write one OME-Zarr store per plate (0.4 in Zarr v2, 0.5 in v3; axes tczyx) without files."""
    rows = table_of(plate)
    for name, plate_rows in rows.groupby("Metadata_Plate"):
        store = out / f"{name}.zarr"
        root = zarr.open_group(store, mode="w", zarr_format=version)
        wells = [
            {"path": path}
            for path in dict.fromkeys(well_of(row) for _, row in plate_rows.iterrows())
        ]
        _describe(root, {"plate": {"name": name, "wells": wells}}, version)
        for _, row in plate_rows.iterrows():
            field = str(int(row["Metadata_Site"]) - 1)
            well = root.require_group(well_of(row))
            fields = _described(well).get("well", {"images": []})["images"]
            _describe(well, {"well": {"images": [*fields, {"path": field}]}}, version)
            image = np.stack([site_pixels(plate, row)[channel] for channel in WRITTEN])[
                None, :, None
            ]
            _write_image(well.create_group(field), image, version)
    if table:
        rows[[column for column in rows if column.startswith("Metadata_")]].to_csv(
            out / "load_data.csv", index=False
        )
    return out


def _write_image(group: zarr.Group, image: np.ndarray, version: int) -> None:
    scales = {"datasets": [{"path": "0"}], "axes": [{"name": axis} for axis in "tczyx"]}
    channels = [{"label": channel} for channel in WRITTEN]
    _describe(group, {"multiscales": [scales], "omero": {"channels": channels}}, version)
    group.create_array("0", data=image, chunks=(1, 1, 1, 40, 64))


def _describe(group: zarr.Group, facts: dict, version: int) -> None:
    group.attrs.update(facts if version == 2 else {"ome": {"version": "0.5", **facts}})


def _described(group: zarr.Group) -> dict:
    attributes = dict(group.attrs)
    return attributes.get("ome", attributes)


def as_jump_lite(plate: Path, out: Path, version: int = 3) -> Path:
    """Write one store in the format of JUMP-Lite: Zarr v3 with Zstd, or v2 with lossless JPEG XL.

    The channels are stored as DNA, ER and RNA; AGP and Mito are empty.
    """
    rows = table_of(plate).assign(Metadata_Source="source_4", Metadata_Batch="batch_1")
    codecs.register_codecs(verbose=False)
    blosc = zarr.codecs.BloscCodec(cname="zstd", clevel=9, shuffle="bitshuffle")
    for _, row in rows.iterrows():
        pixels = site_pixels(plate, row)
        none = np.zeros_like(pixels["DNA"])
        image = np.stack([none, pixels["DNA"], pixels["Actin"], none, pixels["Tubulin"]])
        key = "__".join(
            row[f"Metadata_{part}"] for part in ("Source", "Batch", "Plate", "Well", "Site")
        )
        settings = {
            "compressors": blosc if version == 3 else codecs.Jpegxl(lossless=True),
            "zarr_format": version,
        }
        store = zarr.storage.LocalStore(out / "lite.zarr")
        array = zarr.create_array(
            store, name=key, shape=image.shape, chunks=image.shape, dtype="uint16", **settings
        )
        array[:] = image
    rows.drop(columns=[column for column in rows if "Name_" in column]).to_parquet(
        out / "index.parquet"
    )
    return out
