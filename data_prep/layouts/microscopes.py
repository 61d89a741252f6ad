r"""File layouts of microscopes: the names of their images, and where their metadata are.

Sources of the naming rules: the readers of Bio-Formats (HarmonyReader, MetaxpressTiffReader,
CV7000Reader, ScanrReader, CellomicsReader, InCellReader), the public files of the Cell Painting
Gallery (Opera Phenix) and BBBC021 (ImageXpress), and exports that users of these microscopes
published.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_prep.layouts.file_names import ImageFile, match_path
from data_prep.layouts.metadata import (
    LayoutImages,
    by_folder,
    describe_imagexpress,
    describe_incell,
    describe_incucyte,
    describe_phenix,
    describe_scanr,
    describe_yokogawa,
    files_named,
)

#: Image formats of microscopes; `build` states which of them it reads.
SUFFIXES = (".tif", ".tiff", ".png", ".jp2", ".j2k", ".jls", ".c01", ".dib", ".bmp", ".jpg")
_SUFFIX = rf"(?:{'|'.join(map(re.escape, SUFFIXES))})"
_WELL = r"(?P<well>(?:[A-Z]|A[A-F])\d{2})"
_GUID = r"[0-9A-F]{8}(?:-[0-9A-F]{4}){3}-[0-9A-F]{12}"
#: (images folder, all files below it, images recognized by name) -> images with metadata.
Describe = Callable[[Path, Sequence[str], list[ImageFile]], LayoutImages]


@dataclass(frozen=True)
class Layout:
    """A file layout.

    Attributes:
        title: Name of the microscope or its program.
        patterns: Regular expressions of the file names without suffix.
        markers: Ends of the names of metadata files, in lower case.
        describe: Function that adds the metadata.
    """

    title: str
    patterns: tuple[str, ...]
    markers: tuple[str, ...]
    describe: Describe

    @cached_property
    def expressions(self) -> list[re.Pattern[str]]:
        """Compiled patterns with the suffixes of images."""
        return [re.compile(pattern + _SUFFIX, re.IGNORECASE) for pattern in self.patterns]

    def match(self, path: str) -> ImageFile | None:
        """Read the fields of a path; None if it does not match."""
        matches = (match_path(pattern, path) for pattern in self.expressions)
        return next((image for image in matches if image is not None), None)

    def has_metadata(self, files: Sequence[str]) -> bool:
        """Whether a list of files contains metadata of this layout."""
        return bool(self.markers) and bool(files_named(files, *self.markers))


#: Name -> layout, in the order in which they are tried.
LAYOUTS: dict[str, Layout] = {
    "phenix": Layout(
        "Opera Phenix or Operetta (Harmony)",
        (
            r"(?P<well>r\d{2}c\d{2})f(?P<site>\d+)p(?P<z>\d+)(?:rc\d+)?-ch(?P<channel>\d+)"
            r"(?:(?:sk|t)(?P<time>\d+))?(?:fk\d+)?(?:fl\d+)?",
        ),
        ("index.xml", "index.idx.xml", "index.ref.xml", "index.columbusidx.xml"),
        describe_phenix,
    ),
    "imagexpress": Layout(
        "ImageXpress (MetaXpress)",
        (
            rf"(?P<plate>.+?)_t(?P<time>\d+)_{_WELL}_s(?P<site>\d+)_w(?P<channel>\d+)_z(?P<z>\d+)",
            rf"(?:(?P<plate>.+?)_)?{_WELL}(?:_s(?P<site>\d+))?_w(?P<channel>\d)(?:_z(?P<z>\d+))?"
            rf"(?:_t(?P<time>\d+))?(?:_thumb)?(?:{_GUID})?",
            rf"(?:(?P<plate>.+?)_)?{_WELL}_s(?P<site>\d+)(?:_thumb)?(?:{_GUID})?",
        ),
        (".htd",),
        describe_imagexpress,
    ),
    "cv8000": Layout(
        "Yokogawa CV7000 or CV8000 (CellVoyager)",
        (
            rf"(?P<plate>.+?)_{_WELL}_T(?P<time>\d{{4}})F(?P<site>\d{{3,}})L\d{{2}}A\d{{2}}"
            r"Z(?P<z>\d{2,})C(?P<channel>\d{2})",
        ),
        ("measurementdata.mlf",),
        describe_yokogawa,
    ),
    "scanr": Layout(
        "Olympus ScanR",
        (
            r"(?P<well>[A-Z]{1,2}\d{1,2})--W\d{5}--P(?P<site>\d{5})--Z(?P<z>\d{5})"
            r"--T(?P<time>\d{5})--(?P<channel>.+)",
            r"--(?P<well>W\d{5})--P(?P<site>\d{5})--Z(?P<z>\d{5})--T(?P<time>\d{5})--(?P<channel>.+)",
        ),
        ("experiment_descriptor.xml",),
        describe_scanr,
    ),
    "incucyte": Layout(
        "Incucyte",
        (
            r"(?P<plate>.+?)_(?P<well>[A-P]\d{1,2})_(?P<site>\d+)_"
            r"(?P<time>\d{2,}d\d{2}h\d{2}m|\d{4}y\d{2}m\d{2}d_\d{2}h\d{2}m)",
            r"(?P<well>[A-P]\d{1,2})-(?P<site>\d+)-(?P<channel>C\d|Ph?)",
        ),
        (),
        describe_incucyte,
    ),
    "cellomics": Layout(
        "ArrayScan or CellInsight (Cellomics)",
        (
            rf"(?:(?P<plate>.*?)i3t(?P<time>\d{{3}}))?{_WELL}f(?P<site>\d{{2,3}})d(?P<channel>\d)",
            rf"(?P<plate>.+?)_{_WELL}f(?P<site>\d{{2,3}})d(?P<channel>\d)",
        ),
        (),
        by_folder,
    ),
    "incell": Layout(
        "IN Cell Analyzer",
        (
            r"(?P<well>[A-Z] - \d{1,2})\(fld (?P<site>\d+) wv (?P<channel>[^)]+?)"
            r"(?: z (?P<z>\d+))?(?: time (?P<time>\d+)(?: - \d+ms)?)?\)",
        ),
        (),
        describe_incell,
    ),
}
