"""Recognize the images of a folder: plate, well, site and channel of each file.

The layout with the most matching file names is used. Metadata files of the microscope take
precedence over file names, because they name plates and channels.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.layouts.file_names import ImageFile, compile_pattern, example_pattern, match_path
from data_prep.layouts.metadata import LayoutImages, by_folder
from data_prep.layouts.microscopes import LAYOUTS, SUFFIXES
from perturbjax.core.errors import InputError
from perturbjax.core.files import require_folder

__all__ = ["LAYOUTS", "ImageFile", "Recognized", "list_files", "recognize"]

#: Maximum number of files below the images folder.
MOST_FILES = 5_000_000
#: Number of file names in messages.
_EXAMPLES = 3


@dataclass(frozen=True)
class Recognized:
    """The images of a folder.

    Attributes:
        name: Key of the layout, or "pattern".
        title: Layout in words.
        images: Images with their positions.
        unmatched: Image files that do not follow the layout.
        absent: Images that the metadata name but that do not exist.
        notes: Sentences for the user.
        expressions: Patterns of the file names.
    """

    name: str
    title: str
    images: list[ImageFile]
    unmatched: list[str]
    absent: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    expressions: tuple = ()

    def pattern_with_fixed(self, name: str, image: ImageFile) -> str:
        """Write a pattern of the layout in which one field has the value of an image."""
        file = image.path.rpartition("/")[2]
        matching = [one for one in self.expressions if one.fullmatch(file)]
        return example_pattern(matching[0], image.path, name) if matching else file


def list_files(root: Path) -> list[str]:
    """List the files below a folder as sorted paths with slashes.

    Links are followed, but each folder is listed once.

    Raises:
        InputError: The folder does not exist, is a Zarr store, cannot be read, or has too many
            files.
    """
    require_folder("images", root)
    if root.suffix == ".zarr":
        raise InputError(
            f"--images {root}: is a Zarr store, which lists its sites; pass it to inspect and build"
        )
    files: list[str] = []

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error

    listed = {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        # Changes of `folders` in place decide which folders are visited.
        folders[:] = [
            name for name in sorted(folders) if _is_new(os.path.join(folder, name), listed)
        ]
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        # Hidden files are copies that other programs make, such as `._A01.tif` of macOS.
        visible = (name for name in sorted(names) if not name.startswith("."))
        files += [name if below == "." else f"{below}/{name}" for name in visible]
        if len(files) > MOST_FILES:
            raise InputError(f"--images {root}: has more than {MOST_FILES:,} files; choose a plate")
    return files


def _is_new(folder: str, listed: set[str]) -> bool:
    """Return whether to visit a folder, and remember it. Hidden folders and stores are skipped."""
    real = os.path.realpath(folder)
    is_new = real not in listed and not re.search(r"/\.[^/]*$|\.zarr$", folder)
    listed.add(real)
    return is_new


def recognize(root: Path, layout: str = "auto", pattern: str = "") -> Recognized:
    """Recognize the images below a folder.

    Args:
        root: Folder of the images.
        layout: A key of `LAYOUTS`, or "auto".
        pattern: Pattern of the file names, in place of a layout; see `file_names`.

    Raises:
        InputError: No image follows the layout or the pattern, or metadata are damaged.
    """
    files = list_files(root)
    images = [path for path in files if path.lower().endswith(SUFFIXES)]
    if pattern:
        expression = compile_pattern(pattern)
        matched = [image for path in files if (image := match_path(expression, path))]
        described = by_folder(root, files, matched)
        return _checked(root, "pattern", f"pattern {pattern}", described, images, (expression,))
    if not images:
        raise InputError(
            f"--images {root}: has no image among {len(files):,} files (suffixes: "
            f"{', '.join(SUFFIXES)}); for other suffixes pass --pattern"
        )
    name = layout if layout != "auto" else _best_layout(root, files, images)
    chosen = LAYOUTS[name]
    matched = [image for path in images if (image := chosen.match(path))]
    described = chosen.describe(root, files, matched)
    return _checked(root, name, chosen.title, described, images, tuple(chosen.expressions))


def _best_layout(root: Path, files: list[str], images: list[str]) -> str:
    """Return the layout with the most matches; metadata decide between layouts with matches."""
    ranks = {}
    for name, layout in LAYOUTS.items():
        count = sum(layout.match(path) is not None for path in images)
        ranks[name] = (count > 0, layout.has_metadata(files), count)
    best = max(ranks, key=lambda name: ranks[name])
    if ranks[best] == (False, False, 0):
        raise InputError(
            f"--images {root}: the names of the images follow no layout of {', '.join(LAYOUTS)}; "
            f"for example {', '.join(images[:_EXAMPLES])}. Describe them with --pattern, such as "
            "--pattern '{plate}_{well}_s{site}_w{channel}.tif'"
        )
    return best


def _checked(
    root: Path,
    name: str,
    title: str,
    described: LayoutImages,
    images: list[str],
    expressions: tuple,
) -> Recognized:
    if not described.images:
        more = (
            f" ({len(described.absent)} files of its metadata do not exist)"
            if described.absent
            else ""
        )
        rule = f"the {title}" if name == "pattern" else f"the layout of {title}"
        raise InputError(
            f"--images {root}: no file name follows {rule}{more}; the folder contains for example "
            f"{', '.join(images[:_EXAMPLES]) or 'no image'}"
        )
    used = {image.path for image in described.images}
    unmatched = [path for path in images if path not in used and "_thumb" not in path.lower()]
    return Recognized(
        name, title, described.images, unmatched, described.absent, described.notes, expressions
    )
