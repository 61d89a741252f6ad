"""Reader for images in Zarr stores (v2 and v3): OME-Zarr (full resolution), and arrays (c, y, x).

zarr-python reads them, with the codecs of imagecodecs (including JPEG XL). `zarr_files` limits the
files, and `zarr_codecs` the decoders.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Real

from data_prep.sources.pixel_size import zarr_size
from data_prep.sources.plane import (
    Plane,
    PlaneInfo,
    as_stored,
    channel_number,
    chosen_depths,
    project_stack,
    require_size,
    require_stack,
    stored_type,
)
from data_prep.sources.remote import redacted
from perturbjax.core.errors import InputError

#: Suffix of stores; the rest of a path is inside the store.
SUFFIX = ".zarr"
#: Names of JUMP-Lite arrays (source__batch__plate__well__site), and their channels in order.
JUMP_LITE = re.compile(r"[^/]+?__[^/]+?__[^/]+?__[^/]+?__[^/]+")
JUMP_LITE_CHANNELS = ("AGP", "DNA", "ER", "Mito", "RNA")
#: Axes of OME-Zarr 0.1 and 0.2, whose metadata do not name them.
OLD_AXES = "tczyx"
#: Maximum number of chunks of a plane. 11,585 x 11,585 pixels in chunks of 64 x 64 have 32,761.
MOST_CHUNKS = 1 << 16


@dataclass(frozen=True)
class Image:
    """An array, its axes, channel names and pixel size in micrometers (0 if unknown)."""

    array: Any
    axes: str
    names: list[str]
    pixel_size: float = 0.0

    def size(self, axis: str) -> int:
        """Return the length of an axis; 1 if the array does not have it."""
        return self.array.shape[self.axes.index(axis)] if axis in self.axes else 1

    def chunk(self, axis: str) -> int:
        """Return the length of a chunk along an axis."""
        return self.array.chunks[self.axes.index(axis)] if axis in self.axes else 1

    def block(self, channels: slice, depths: slice) -> np.ndarray:
        """Read pixels as (channels, depths, height, width)."""
        # Images with several time points are refused earlier, so index 0 is the only one.
        selection = {"c": channels, "z": depths, "t": slice(0, 1)}
        pixels = np.asarray(
            self.array[tuple(selection.get(axis, slice(None)) for axis in self.axes)]
        )
        # The axes of the array can have any order; sort them to time, channel, depth, height,
        # width.
        order = [axis for axis in "tczyx" if axis in self.axes]
        pixels = pixels.transpose([self.axes.index(axis) for axis in order])
        return pixels.reshape(
            channels.stop - channels.start, depths.stop - depths.start, *pixels.shape[-2:]
        )


def inside_store(file: str) -> bool:
    """Return whether a path or URL is a Zarr store or inside one."""
    return any(part.endswith(SUFFIX) for part in file.split("/"))


def split_store(file: str) -> tuple[str, str]:
    """Split a path or URL into the store and the path inside it."""
    parts = file.split("/")
    # The first folder with the suffix is the store; all later parts are inside of it.
    end = next(index for index, part in enumerate(parts) if part.endswith(SUFFIX)) + 1
    return "/".join(parts[:end]), "/".join(parts[end:])


def read(planes: Sequence[Plane], where: str) -> list[Real[np.ndarray, "h w"]]:
    """Read planes of one image; chunks with several channels are decoded once.

    Raises:
        InputError: As `probe`; or a chunk is missing, damaged or has a wrong shape.
    """
    image, numbers = _check(planes, where)
    with _one_line(planes[0].file, where):
        stacks = _stacks(image, numbers, planes)
    return [as_stored(stack, plane, where) for stack, plane in zip(stacks, planes, strict=True)]


def probe(planes: Sequence[Plane], where: str) -> list[PlaneInfo]:
    """Read data type, size and depth of planes from the metadata.

    Raises:
        InputError: The image or a channel is missing, its codec is not installed, its metadata
            contradict each other, or it is a movie, or a stack without projection.
    """
    image, _ = _check(planes, where)
    dtype = stored_type(image.array.dtype, planes[0], where)
    shape = (image.size("y"), image.size("x"))
    return [PlaneInfo(dtype, shape, image.size("z"), image.pixel_size)] * len(planes)


def channel_names(file: str, where: str) -> list[str]:
    """Return the channel names of an image; an empty list if it has none.

    Raises:
        InputError: As `probe`.
    """
    return open_image(file, where).names


def open_image(file: str, where: str) -> Image:
    """Open an image of a store.

    Raises:
        InputError: The image cannot be read.
    """
    root, path = split_store(file)
    with _one_line(file, where):
        return _image(_store(root, where), path, file, where)


def attributes(file: str, where: str) -> dict[str, Any]:
    """Return the OME metadata of a group. From OME-Zarr 0.5 on they are under the key `ome`.

    Raises:
        InputError: The group does not exist.
    """
    root, path = split_store(file)
    with _one_line(file, where):
        store = _store(root, where)
        metadata: Any = dict(_zarr(root, where).open_group(store, path=path, mode="r").attrs)
        metadata = metadata.get("ome", metadata)
        if not isinstance(metadata, dict):
            raise TypeError(f"OME metadata are {type(metadata).__name__}")
        return metadata


def _image(store: Any, path: str, file: str, where: str) -> Image:
    import zarr

    from data_prep.sources.zarr_codecs import bounded

    node = zarr.open(store=store, path=path, mode="r")
    if isinstance(node, zarr.Array):
        # JUMP-Lite arrays have no metadata: their name determines the channels.
        lite = JUMP_LITE_CHANNELS if JUMP_LITE.fullmatch(path.rpartition("/")[2]) else ()
        if node.ndim not in (2, 3):
            raise InputError(
                f"{where}: {redacted(file)} has shape {node.shape}; (channel, y, x) or (y, x) is "
                "needed"
            )
        return Image(bounded(node), "cyx"[-node.ndim :], list(lite))
    metadata: Any = dict(node.attrs)
    metadata = metadata.get("ome", metadata)
    scales = metadata["multiscales"][0]
    # The first data set of a multiscale image has the full resolution.
    array = zarr.open_array(
        store, path=f"{path}/{scales['datasets'][0]['path']}".strip("/"), mode="r"
    )
    axes = "".join(
        axis if isinstance(axis, str) else axis["name"] for axis in scales.get("axes", OLD_AXES)
    )
    if (
        len(axes) != array.ndim
        or not {"y", "x"} <= set(axes) <= set(OLD_AXES)
        or len(set(axes)) < len(axes)
    ):
        raise InputError(
            f"{where}: {redacted(file)} has shape {array.shape} and axes {axes}; its metadata "
            "contradict its "
            "array"
        )
    names = [
        str(channel.get("label", "")) for channel in metadata.get("omero", {}).get("channels", [])
    ]
    return Image(bounded(array), axes, names if all(names) else [], zarr_size(scales))


def _check(planes: Sequence[Plane], where: str) -> tuple[Image, list[int]]:
    """Open an image, check its metadata, and return it with the channel number of each plane."""
    file = planes[0].file
    if any(plane.series is not None or plane.frame is not None for plane in planes):
        raise InputError(
            f"{where}: {redacted(file)} is in a Zarr store; Series_Orig and Frame_Orig are for "
            "TIFF files"
        )
    image = open_image(file, where)
    stored_type(image.array.dtype, planes[0], where)
    require_size((image.size("y"), image.size("x")), planes[0], where)
    require_size(image.array.chunks, planes[0], where)
    if codec := _forbidden_codec(image.array.metadata):
        raise InputError(f"{where}: {redacted(file)} uses codec {codec}, which is not permitted")
    _require_chunks(image, file, where)
    if image.size("t") > 1:
        raise InputError(
            f"{where}: {redacted(file)} is a movie of {image.size('t')} frames; export one time "
            "point"
        )
    for plane in planes:
        require_stack(image.size("z"), plane, where)
    return image, [channel_number(plane, image.names, image.size("c"), where) for plane in planes]


def _require_chunks(image: Image, file: str, where: str) -> None:
    """Refuse empty arrays, and planes of so many chunks that reading them would not end."""
    if 0 in image.array.shape:
        raise InputError(f"{where}: {redacted(file)} is empty: its shape is {image.array.shape}")
    count = math.prod(-(-image.size(axis) // image.chunk(axis)) for axis in "yx")
    if count > MOST_CHUNKS:
        raise InputError(
            f"{where}: {redacted(file)} claims {count} chunks per plane; it was not read"
        )


def _stacks(
    image: Image, numbers: list[int], planes: Sequence[Plane]
) -> list[Real[np.ndarray, "h w"]]:
    depth = image.size("z")
    # Chunks of one channel, or stacks: each channel is read separately.
    if image.chunk("c") == 1 or depth > 1:
        return [
            project_stack(
                _depths(image, number, chosen_depths(depth, plane.project)), plane.project
            )
            for number, plane in zip(numbers, planes, strict=True)
        ]
    # Chunks contain several channels: one read covers all requested ones.
    low = min(numbers)
    block = image.block(slice(low, max(numbers) + 1), slice(0, 1))
    return [block[number - low, 0] for number in numbers]


def _depths(image: Image, channel: int, depths: range) -> Iterator[np.ndarray]:
    """Yield the planes of a stack, reading one chunk depth at a time to limit memory."""
    step = image.chunk("z")
    for start in range(depths.start, depths.stop, step):
        yield from image.block(
            slice(channel, channel + 1), slice(start, min(start + step, depths.stop))
        )[0]


def _zarr(root: str, where: str) -> Any:
    try:
        import zarr
    except ImportError as error:
        raise InputError(
            f"{where}: {redacted(root)} is a Zarr store; reading it requires: pip install "
            '"perturbjax[zarr]"'
        ) from error
    return zarr


@functools.cache
def _zarr_codecs() -> None:
    """Register the codecs of imagecodecs with zarr, for example JPEG XL."""
    from imagecodecs import numcodecs

    numcodecs.register_codecs(verbose=False)


def _forbidden_codec(metadata: Any) -> str | None:
    from data_prep.sources.zarr_codecs import forbidden_codec

    return forbidden_codec(metadata)


def _store(root: str, where: str) -> Any:
    """Open a store, after registering the codecs of imagecodecs."""
    _zarr(root, where)
    from data_prep.sources.zarr_files import open_store

    _zarr_codecs()
    return open_store(root, where)


@contextmanager
def _one_line(file: str, where: str) -> Iterator[None]:
    """Convert any error of zarr and its codecs to one line."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{where}: {redacted(file)} does not exist in the store") from error
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise InputError(
            f"{where}: {redacted(file)} is not an OME-Zarr image, or its metadata are damaged "
            f"({error!r})"
        ) from error
    except Exception as error:  # codecs raise many types
        if type(error).__name__ == "MissingChunk":
            raise InputError(
                f"{where}: {redacted(file)}: {error}; the store is incomplete, or was written "
                "without its empty chunks"
            ) from error
        if type(error).__name__ == "UnknownCodecError":
            raise InputError(
                f"{where}: {redacted(file)} uses a codec that is not installed ({error}); install "
                "its package"
            ) from error
        raise InputError(
            f"{where}: {redacted(file)} cannot be read: its metadata or a chunk is damaged or has "
            "a wrong "
            f"shape ({error})"
        ) from error
