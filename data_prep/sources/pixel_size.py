"""Physical size of a pixel in micrometers, from the metadata of image files.

Resolutions of TIFF files are used only with the unit that ImageJ writes. Other programs store the
resolution of a print (72 dots per inch) or of the camera (Opera Phenix) there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any
from xml.etree import ElementTree

#: Micrometers of a unit, in the spellings of OME-XML, OME-Zarr, ImageJ and MetaXpress.
_UNITS = {
    "nm": 1e-3,
    "nanometer": 1e-3,
    **dict.fromkeys(("um", "µm", "μm", "\\u00b5m", "micron", "microns", "micrometer"), 1.0),
    "mm": 1e3,
    "millimeter": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "meter": 1e6,
}
#: Valid sizes in micrometers; others are placeholders or damaged.
_SMALLEST, _LARGEST = 1e-3, 1e3
#: Relative difference up to which two sizes are equal.
_TOLERANCE = 0.01


def micrometers(value: Any, unit: object) -> float:
    """Convert a length to micrometers; 0 if the unit is unknown or the length is not plausible."""
    try:
        size = float(value) * _UNITS.get(str(unit).strip().lower(), math.nan)
    except (TypeError, ValueError):
        return 0.0
    return size if _SMALLEST <= size <= _LARGEST else 0.0


def common_size(sizes: Iterable[float]) -> float:
    """Return the size on which all values agree; 0 if there are none, or they differ or are 0."""
    values = list(sizes)
    low, high = min(values, default=0.0), max(values, default=0.0)
    # Files of one microscope differ in the last digits.
    return values[0] if low > 0 and high <= low * (1 + _TOLERANCE) else 0.0


def ome_xml_size(text: str, image: int | None) -> float:
    """Return the pixel size in OME-XML.

    Args:
        text: OME-XML.
        image: Number of the image; None requires one size of all images.
    """
    # Elements have the namespace of their version of the schema.
    pixels = [e for e in ElementTree.fromstring(text).iter() if e.tag.endswith("}Pixels")]
    chosen = pixels if image is None else pixels[image : image + 1]
    # The schema declares µm as the default unit.
    return common_size(
        micrometers(
            element.get(f"PhysicalSize{axis}"), element.get(f"PhysicalSize{axis}Unit", "µm")
        )
        for element in chosen
        for axis in "XY"
    )


def tiff_size(tiff: Any, page: Any, image: int | None) -> float:
    """Return the pixel size in the OME, ImageJ or MetaXpress metadata of a TIFF; 0 without them.

    Args:
        tiff: Open `tifffile.TiffFile`.
        page: One of its pages.
        image: Number of the image in OME metadata, if the table states it.
    """
    try:
        if tiff.is_ome:
            return ome_xml_size(tiff.ome_metadata, image)
        if tiff.is_metaseries:
            plane = tiff.metaseries_metadata["PlaneInfo"]
            unit = plane["spatial-calibration-units"]
            return common_size(micrometers(plane[f"spatial-calibration-{a}"], unit) for a in "xy")
        if tiff.is_imagej:
            metadata = tiff.imagej_metadata
            units = {"X": metadata["unit"], "Y": metadata.get("yunit", metadata["unit"])}
            return common_size(_imagej_size(page, axis, unit) for axis, unit in units.items())
    except Exception:  # damaged metadata raise many types; the pixels can still be read
        return 0.0
    return 0.0


def _imagej_size(page: Any, axis: str, unit: str) -> float:
    pixels, units = page.tags[f"{axis}Resolution"].value
    return micrometers(units / pixels, unit)


def czi_size(metadata: str) -> float:
    """Return the pixel size in CZI metadata, which are in meters."""
    distances = ElementTree.fromstring(metadata).findall("./Metadata/Scaling/Items/Distance")
    sizes = {
        distance.get("Id"): micrometers(distance.findtext("Value"), "m") for distance in distances
    }
    return common_size(sizes.get(axis, 0.0) for axis in "XY")


def zarr_size(scales: dict[str, Any]) -> float:
    """Return the pixel size in the multiscale metadata of OME-Zarr, at full resolution.

    Axes without a unit have no physical size.
    """
    try:
        axes = [axis for axis in scales["axes"] if isinstance(axis, dict)]
        factors = [1.0] * len(axes)
        # Transformations of the image follow those of the data set.
        for owner in (scales["datasets"][0], scales):
            for transformation in owner.get("coordinateTransformations", []):
                if transformation["type"] == "scale":
                    pairs = zip(factors, transformation["scale"], strict=True)
                    factors = [factor * float(scale) for factor, scale in pairs]
        return common_size(
            micrometers(factor, axis.get("unit"))
            for factor, axis in zip(factors, axes, strict=True)
            if axis["name"] in ("x", "y")
        )
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return 0.0
