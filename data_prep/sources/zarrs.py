"""Images in Zarr stores, v2 and v3: OME-Zarr's (the largest level of a multiscale image), and bare arrays (c, y, x).

Read by zarr-python, whose codecs include imagecodecs' (JPEG XL among them), which no other reader of Zarr takes. Zarr
reads a chunk that is not there as zeros; here it is an error, since a store that is half there looks the same.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt

from data_prep.sources import remote
from data_prep.sources.files import zarr_store
from data_prep.sources.plane import (
    Found,
    Plane,
    as_stored,
    channel_number,
    chosen_depths,
    projected,
    require_size,
    require_stack,
    stored_type,
)
from perturbjax.core.errors import InputError

#: How names of stores end: what follows in a path lies inside.
SUFFIX = ".zarr"
#: JUMP-Lite's arrays, source__batch__plate__well__site, and the channels that each of them holds, in this order.
JUMP_LITE = re.compile(r"[^/]+?__[^/]+?__[^/]+?__[^/]+?__[^/]+")
JUMP_LITE_CHANNELS = ("AGP", "DNA", "ER", "Mito", "RNA")
#: What may stand in a store's metadata to be undone; others (pickle!) are not run on what strangers send.
CODECS = re.compile(
    "imagecodecs_.*|(numcodecs[.])?(blosc|zstd|zlib|gzip|lz4|lz4hc|bz2|lzma|delta|shuffle|packbits|bitround|"
    "fixedscaleoffset|crc32c?|adler32|fletcher32)|bytes|transpose|sharding_indexed"
)
#: Axes of OME-Zarr 0.1 and 0.2, whose metadata do not name them.
OLD_AXES = "tczyx"


@dataclass(frozen=True)
class Image:
    """An array and what its metadata say of it."""

    array: Any
    axes: str
    names: list[str]
    missing: list[str]
    """Chunks that were asked for and are not there."""

    def size(self, axis: str) -> int:
        return self.array.shape[self.axes.index(axis)] if axis in self.axes else 1

    def chunk(self, axis: str) -> int:
        return self.array.chunks[self.axes.index(axis)] if axis in self.axes else 1

    def block(self, channels: slice, depths: slice) -> np.ndarray:
        """Pixels as (c, z, y, x)."""
        wanted = {"c": channels, "z": depths, "t": slice(0, 1)}
        pixels = np.asarray(self.array[tuple(wanted.get(axis, slice(None)) for axis in self.axes)])
        order = [axis for axis in "tczyx" if axis in self.axes]
        pixels = pixels.transpose([self.axes.index(axis) for axis in order])
        return pixels.reshape(
            channels.stop - channels.start, depths.stop - depths.start, *pixels.shape[-2:]
        )


def inside_store(file: str) -> bool:
    """Whether a path or URL leads to a Zarr store or into one."""
    return any(part.endswith(SUFFIX) for part in file.split("/"))


def split_store(file: str) -> tuple[str, str]:
    """The store of a path or URL, and the path inside it."""
    parts = file.split("/")
    at = next(index for index, part in enumerate(parts) if part.endswith(SUFFIX)) + 1
    return "/".join(parts[:at]), "/".join(parts[at:])


def read(planes: Sequence[Plane], where: str) -> list[UInt[np.ndarray, "h w"]]:
    """The planes of one image; chunks that hold several channels are decoded once for all of them.

    Raises:
        InputError: as `probe`; a chunk is missing, of another shape or damaged.
    """
    image, numbers = _checked(planes, where)
    with _told(planes[0].file, where):
        stacks = _stacks(image, numbers, planes)
    if image.missing:
        raise InputError(
            f"{where}: {planes[0].file}: chunk {image.missing[0]} is missing ({len(image.missing)} such); the store is "
            "half there, or was written without its empty chunks"
        )
    return [as_stored(stack, plane, where) for stack, plane in zip(stacks, planes, strict=True)]


def probe(planes: Sequence[Plane], where: str) -> list[Found]:
    """What the metadata say of the planes.

    Raises:
        InputError: the image is not in the store, its codec is not installed, its metadata contradict each other, a
            channel is not in it, or it is a stack or a movie and nobody said how it becomes one plane.
    """
    image, _ = _checked(planes, where)
    dtype = stored_type(image.array.dtype, planes[0], where)
    return [Found(dtype, (image.size("y"), image.size("x")), image.size("z"))] * len(planes)


def channel_names(file: str, where: str) -> list[str]:
    """Names of an image's channels; none where it names none.

    Raises:
        InputError: as `probe`.
    """
    return opened(file, where).names


def opened(file: str, where: str) -> Image:
    """An image of a store.

    Raises:
        InputError: it cannot be read.
    """
    root, path = split_store(file)
    with _told(file, where):
        store, missing = _recording(root, where)
        image = _image(store, path, file, where)
        missing.clear()
        return Image(*image, missing)


def attributes(file: str, where: str) -> dict[str, Any]:
    """Metadata of a group; OME's, where they stand under their own name as in OME-Zarr 0.5.

    Raises:
        InputError: there is no such group.
    """
    root, path = split_store(file)
    with _told(file, where):
        store, _ = _recording(root, where)
        found: Any = dict(_zarr(root, where).open_group(store, path=path, mode="r").attrs)
        return found.get("ome", found)


def _image(store: Any, path: str, file: str, where: str) -> tuple[Any, str, list[str]]:
    import zarr

    node = zarr.open(store=store, path=path, mode="r")
    if isinstance(node, zarr.Array):
        lite = JUMP_LITE_CHANNELS if JUMP_LITE.fullmatch(path.rpartition("/")[2]) else ()
        if node.ndim not in (2, 3):
            raise InputError(
                f"{where}: {file} has shape {node.shape}; (channel, y, x) or (y, x) is needed"
            )
        return node, "cyx"[-node.ndim :], list(lite)
    metadata: Any = dict(node.attrs)
    metadata = metadata.get("ome", metadata)
    scales = metadata["multiscales"][0]
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
            f"{where}: {file} has shape {array.shape} and axes {axes}; its metadata contradict its array"
        )
    names = [
        str(channel.get("label", "")) for channel in metadata.get("omero", {}).get("channels", [])
    ]
    return array, axes, names if all(names) else []


def _checked(planes: Sequence[Plane], where: str) -> tuple[Image, list[int]]:
    """The image, and the number of the channel of each plane."""
    file = planes[0].file
    if any(plane.series is not None or plane.frame is not None for plane in planes):
        raise InputError(
            f"{where}: {file} lies in a Zarr store; Series_Orig and Frame_Orig are for files"
        )
    image = opened(file, where)
    stored_type(image.array.dtype, planes[0], where)
    require_size((image.size("y"), image.size("x")), planes[0], where)
    require_size(image.array.chunks, planes[0], where)
    for codec in _codecs(image.array.metadata):
        if not CODECS.fullmatch(codec):
            raise InputError(f"{where}: {file} is kept with codec {codec}, which is not read here")
    if image.size("t") > 1:
        raise InputError(
            f"{where}: {file} is a movie of {image.size('t')} frames; one plane is needed"
        )
    for plane in planes:
        require_stack(image.size("z"), plane, where)
    return image, [channel_number(plane, image.names, image.size("c"), where) for plane in planes]


def _codecs(metadata: Any) -> Iterator[str]:
    """Names of what undoes an array's chunks; those inside a shard too."""
    if metadata.zarr_format == 2:
        yield from (
            codec.codec_id
            for codec in (metadata.compressor, *(metadata.filters or ()))
            if codec is not None
        )
        return
    waiting = list(metadata.to_dict()["codecs"])
    while waiting:
        codec = waiting.pop()
        yield codec["name"]
        inside = codec.get("configuration", {})
        waiting += [*inside.get("codecs", ()), *inside.get("index_codecs", ())]


def _stacks(
    image: Image, numbers: list[int], planes: Sequence[Plane]
) -> list[Integer[np.ndarray, "h w"]]:
    depth = image.size("z")
    if image.chunk("c") == 1 or depth > 1:
        return [
            projected(_depths(image, number, chosen_depths(depth, plane.project)), plane.project)
            for number, plane in zip(numbers, planes, strict=True)
        ]
    low = min(numbers)
    together = image.block(slice(low, max(numbers) + 1), slice(0, 1))
    return [together[number - low, 0] for number in numbers]


def _depths(image: Image, channel: int, depths: range) -> Iterator[np.ndarray]:
    """Planes of a stack, read a chunk's depth at a time: a deep stack never lies in memory as a whole."""
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
            f'{where}: {root} is a Zarr store; to read it: pip install "perturbjax[zarr]"'
        ) from error
    return zarr


@functools.cache
def _zarr_codecs() -> None:
    """Make imagecodecs' codecs known to zarr, for stores of JPEG XL and the like."""
    from imagecodecs import numcodecs

    numcodecs.register_codecs(verbose=False)


def _recording(root: str, where: str) -> tuple[Any, list[str]]:
    """A store that is read through zarr, and a list to which it adds what it was asked for and does not have."""
    _zarr(root, where)
    from zarr.storage import WrapperStore

    _zarr_codecs()
    missing: list[str] = []

    class Recording(WrapperStore):
        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            value = await super().get(key, prototype, byte_range)
            if value is None:
                missing.append(key)
            return value

    return Recording(zarr_store(root, where)), missing


@contextmanager
def _told(file: str, where: str) -> Iterator[None]:
    """One line for whatever zarr and its codecs raise."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{where}: {file} is not in the store") from error
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise InputError(
            f"{where}: {file} is no image of OME-Zarr, or its metadata are damaged ({error!r})"
        ) from error
    except Exception as error:  # codecs raise many kinds
        if type(error).__name__ == "UnknownCodecError":
            raise InputError(
                f"{where}: {file} is kept with a codec that is not installed ({error}); install the package that has it"
            ) from error
        if type(error).__module__.startswith("obstore"):
            raise InputError(f"{where}: {file} {remote.reason(error)}") from error
        raise InputError(
            f"{where}: {file} cannot be read: its metadata or a chunk is damaged, or of another shape ({error})"
        ) from error
