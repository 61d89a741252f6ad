"""One simulated plate in other formats, each written by the format's own library, with the table that goes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pandas as pd
import tifffile

CHANNELS = ("DNA", "Actin", "Tubulin")
#: Order in which files of several channels hold them: not the table's.
WRITTEN = ("Tubulin", "DNA", "Actin")


def table_of(plate: Path) -> pd.DataFrame:
    return pd.read_csv(plate / "load_data.csv", dtype=str, keep_default_na=False)


def site_pixels(plate: Path, row: pd.Series) -> dict[str, np.ndarray]:
    return {c: tifffile.imread(plate / row[f"PathName_Orig{c}"] / row[f"FileName_Orig{c}"]) for c in CHANNELS}


def site_name(row: pd.Series) -> str:
    return f"{row['Metadata_Plate']}_{row['Metadata_Well']}_{row['Metadata_Site']}"


def rewritten(plate: Path, out: Path, write: Callable[[Path, dict[str, np.ndarray]], dict[str, str]]) -> Path:
    """The plate with `write(path without suffix, pixels)` for every site, which gives channel → name of its file."""
    table = table_of(plate)
    (out / "images").mkdir(parents=True)
    for at, row in table.iterrows():
        for channel, name in write(out / "images" / site_name(row), site_pixels(plate, row)).items():
            table.loc[at, [f"FileName_Orig{channel}", f"PathName_Orig{channel}"]] = [name, "images"]
    table.to_csv(out / "load_data.csv", index=False)
    return out


def as_ome_tiff(plate: Path, out: Path) -> Path:
    """One file a site, its channels named in it."""

    def write(path: Path, pixels: dict[str, np.ndarray]) -> dict[str, str]:
        metadata = {"axes": "CYX", "Channel": {"Name": list(WRITTEN)}}
        image = np.stack([pixels[channel] for channel in WRITTEN])
        tifffile.imwrite(f"{path}.ome.tiff", image, ome=True, metadata=metadata, photometric="minisblack")
        return dict.fromkeys(CHANNELS, f"{path.name}.ome.tiff")

    return rewritten(plate, out, write)


def as_ome_stack(plate: Path, out: Path) -> Path:
    """One file a site, every channel a stack of three planes whose middle one is the plate's."""

    def write(path: Path, pixels: dict[str, np.ndarray]) -> dict[str, str]:
        metadata = {"axes": "CZYX", "Channel": {"Name": list(WRITTEN)}}
        image = np.stack([np.stack([pixels[c] // 2, pixels[c], pixels[c] // 3]) for c in WRITTEN])
        tifffile.imwrite(f"{path}.ome.tiff", image, ome=True, metadata=metadata, photometric="minisblack")
        return dict.fromkeys(CHANNELS, f"{path.name}.ome.tiff")

    return rewritten(plate, out, write)


def as_png(plate: Path, out: Path) -> Path:
    def write(path: Path, pixels: dict[str, np.ndarray]) -> dict[str, str]:
        for channel, image in pixels.items():
            Path(f"{path}_{channel}.png").write_bytes(imagecodecs.png_encode(image))
        return {channel: f"{path.name}_{channel}.png" for channel in pixels}

    return rewritten(plate, out, write)
