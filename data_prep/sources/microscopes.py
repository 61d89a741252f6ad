"""Reader for microscope files with many images: Nikon ND2, Zeiss CZI, Leica LIF and LOF.

Each format has a small package (extra `microscopes`). A file contains scenes (positions, in LIF
images), each with channels, focal planes and time points. `Series_Orig<CHANNEL>` selects the scene,
`Channel_Orig<CHANNEL>` the channel, and `Frame_Orig<CHANNEL>` a plane in the order time, focal
plane, channel (the channel changes fastest).
"""

from __future__ import annotations

import math
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple, cast
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Real

from data_prep.sources.files import open_file
from data_prep.sources.pixel_size import common_size, czi_size, micrometers
from data_prep.sources.plane import (
    Plane,
    PlaneInfo,
    as_stored,
    channel_number,
    chosen_depths,
    project_stack,
    require_size,
    require_stack,
    select_sample,
    stored_type,
)
from data_prep.sources.remote import is_remote, redacted
from perturbjax.core.errors import InputError

#: Axes of a scene besides height, width and samples, in the order of `Frame_Orig`.
AXES = "TZC"
#: Types of CZI pixels that can be read: NumPy type and number of samples.
_CZI_TYPES = {
    "Gray8": ("u1", 1),
    "Gray16": ("u2", 1),
    "Gray32Float": ("f4", 1),
    "Bgr24": ("u1", 3),
    "Bgr48": ("u2", 3),
}


@dataclass(frozen=True)
class Scene:
    """One image of a file."""

    sizes: Mapping[str, int]
    """Length of each axis except height, width and samples."""
    shape: tuple[int, int]
    """(height, width)."""
    dtype: np.dtype
    samples: int
    """Samples per pixel: 1 gray, 3 RGB."""
    names: list[str]
    """Names of the channels; empty if the file has none."""
    read: Callable[[dict[str, int]], np.ndarray]
    """Return the pixels at an index of each axis in `AXES`, with samples as the last axis."""
    pixel_size: float = 0.0
    """Height and width of a pixel in micrometers; 0 if the file does not state it."""

    def size(self, axis: str) -> int:
        """Return the length of an axis; 1 if the scene does not have it."""
        return self.sizes.get(axis, 1)


class Scenes(NamedTuple):
    """The scenes of an open file."""

    number: int
    scene: Callable[[int], Scene]


def read(planes: Sequence[Plane], where: str) -> list[Real[np.ndarray, "h w"]]:
    """Read planes of one file.

    Raises:
        InputError: As `probe`; or a plane is damaged.
    """
    with _open(planes[0].file, where) as scenes:
        return [_plane_pixels(*_choose(scenes, plane, where), plane, where) for plane in planes]


def probe(planes: Sequence[Plane], where: str) -> list[PlaneInfo]:
    """Read data type, size and depth of planes. Color images are decoded.

    Raises:
        InputError: The package of the format is not installed, the file is not readable, or the
            table does not select one plane, or one stack with a projection.
    """
    with _open(planes[0].file, where) as scenes:
        chosen = [_choose(scenes, plane, where) for plane in planes]
        for plane, (scene, indices) in zip(planes, chosen, strict=True):
            if scene.samples > 1:  # only pixels show whether a sample must be selected
                _plane_pixels(scene, indices[:1], plane, where)
    return [
        PlaneInfo(
            stored_type(scene.dtype, plane, where), scene.shape, len(indices), scene.pixel_size
        )
        for plane, (scene, indices) in zip(planes, chosen, strict=True)
    ]


def _choose(scenes: Scenes, plane: Plane, where: str) -> tuple[Scene, list[dict[str, int]]]:
    """Return the scene of a plane, and the index of each focal plane."""
    number = plane.series or 0
    if plane.series is None and scenes.number > 1:
        raise InputError(
            f"{where}: {plane} contains {scenes.number} images (positions); select one in a column "
            "Series_Orig<CHANNEL>, from 0"
        )
    if number >= scenes.number:
        raise InputError(
            f"{where}: {plane} is not in the file, which contains {scenes.number} images"
        )
    scene = scenes.scene(number)
    require_size((*scene.shape, scene.samples), plane, where)
    stored_type(scene.dtype, plane, where)
    unknown = [
        f"{size} {axis}" for axis, size in scene.sizes.items() if axis not in AXES and size > 1
    ]
    if unknown:
        raise InputError(
            f"{where}: {plane} has axes without a column in the table ({', '.join(unknown)}); "
            "export single images as OME-TIFF"
        )
    if plane.frame is not None:
        shape = [scene.size(axis) for axis in AXES]
        if plane.frame >= math.prod(shape):
            raise InputError(
                f"{where}: {plane} is not in the file, which contains {math.prod(shape)} planes"
            )
        index = np.unravel_index(plane.frame, shape)
        return scene, [dict(zip(AXES, map(int, index), strict=True))]
    if scene.size("T") > 1:
        raise InputError(
            f"{where}: {plane} is a movie of {scene.size('T')} frames; select one in a column "
            "Frame_Orig<CHANNEL>, or export one time point"
        )
    count = scene.size("C")
    channel = channel_number(plane, scene.names, count, where) if count > 1 else 0
    require_stack(scene.size("Z"), plane, where)
    return scene, [{"T": 0, "Z": depth, "C": channel} for depth in range(scene.size("Z"))]


def _plane_pixels(
    scene: Scene, indices: list[dict[str, int]], plane: Plane, where: str
) -> Real[np.ndarray, "h w"]:
    def pixels(index: dict[str, int]) -> np.ndarray:
        image = np.asarray(scene.read(index))
        if image.shape != (*scene.shape, scene.samples):
            raise InputError(
                f"{where}: {plane} decodes to {image.shape}, but its metadata declare "
                f"{(*scene.shape, scene.samples)}; the file is damaged"
            )
        one = image[..., 0] if scene.samples == 1 else select_sample(image, plane, where)
        return as_stored(one, plane, where)

    chosen = [indices[depth] for depth in chosen_depths(len(indices), plane.project)]
    return project_stack(map(pixels, chosen), plane.project)


@contextmanager
def _open(file: str, where: str) -> Iterator[Scenes]:
    """Open a file; any error within the block becomes one line."""
    kind, label = KINDS[PurePosixPath(file).suffix.lower()], redacted(file)
    try:
        with kind.open(file, where) as scenes:
            yield scenes
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"{where}: {label} is {kind.name}; reading it requires pip install "
            '"perturbjax[microscopes]". Or convert it to OME-Zarr with bioformats2raw'
        ) from error
    except Exception as error:  # each package raises other types
        text = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise InputError(
            f"{where}: {label} is not a readable {kind.name}, or is truncated ({text})"
        ) from error


@contextmanager
def _nd2(file: str, where: str) -> Iterator[Scenes]:
    import nd2

    with open_file(file, where, header=True) as stream, nd2.ND2File(stream) as content:
        sizes = dict(content.sizes)
        count, dtype = sizes.pop("P", 1), content.dtype
        shape, samples = (sizes.pop("Y"), sizes.pop("X")), sizes.pop("S", 1)
        channels = content.metadata.channels or ()
        names = [channel.channel.name for channel in channels]
        pixel_size = common_size(_nd2_size(channel.volume) for channel in channels)
        frames = {
            tuple(index.get(axis, 0) for axis in "PTZ"): frame
            for frame, index in enumerate(content.loop_indices or ({},))
        }

        def read_frame(series: int, index: dict[str, int]) -> np.ndarray:
            frame = frames[series, index["T"], index["Z"]]
            _require_nd2_frame(content, frame)
            pixels = content.read_frame(frame).reshape(-1, *shape, samples)
            return pixels[index["C"]].copy()  # the file is unmapped when it is closed

        def scene(series: int) -> Scene:
            def read(index: dict[str, int]) -> np.ndarray:
                return read_frame(series, index)

            return Scene(sizes, shape, dtype, samples, names, read, pixel_size)

        yield Scenes(count, scene)


def _nd2_size(volume: Any) -> float:
    """Return the pixel size of a channel; files without calibration contain 1 µm."""
    calibrated, lengths = volume.axesCalibrated[:2], volume.axesCalibration[:2]
    return common_size(micrometers(length, "um") for length in lengths) if all(calibrated) else 0.0


def _require_nd2_frame(content: Any, frame: int) -> None:
    """Refuse frames that are not in the file, which the package reads as zeros."""
    reader, compression = content._rdr, content.attributes.compressionType
    if content.is_legacy:  # a file of before 2010, which stores JPEG 2000 images
        return
    if compression == "lossy":
        raise ValueError("lossy compression is not supported")
    offsets, size = reader._frame_offsets, math.prod(content._raw_frame_shape)
    size *= content.dtype.itemsize
    if compression == "lossless" and frame in offsets:
        # The package decompresses without a limit.
        chunk = reader._load_chunk(f"ImageDataSeq|{frame}!".encode())[8:]
        if len(zlib.decompressobj().decompress(chunk, size + 1)) != size:
            raise ValueError(f"frame {frame} has another size than its metadata declare")
        return
    end = reader._fh.seek(0, os.SEEK_END)
    if frame not in offsets or offsets[frame] + size > end:
        raise ValueError(f"frame {frame} is missing")


@contextmanager
def _czi(file: str, where: str) -> Iterator[Scenes]:
    from pylibCZIrw import czi

    if is_remote(file):
        raise InputError(
            f"{where}: {redacted(file)}: CZI files are read from a local disk only; copy it, or "
            "convert it to OME-Zarr with bioformats2raw"
        )
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise InputError(f"{where}: {file} is not a file, and therefore not a readable image")
    with czi.open_czi(file) as content:
        bounds = content.total_bounding_box
        scenes = sorted(content.scenes_bounding_rectangle.items())
        sizes = {axis: end - start for axis, (start, end) in bounds.items() if axis not in "XY"}
        types = content.pixel_types
        names, pixel_size = _czi_names(content.raw_metadata), czi_size(content.raw_metadata)

        def read_plane(series: int, index: dict[str, int]) -> np.ndarray:
            plane = {axis: bounds[axis][0] + index[axis] for axis in AXES if axis in bounds}
            scene, area = scenes[series] if scenes else (None, content.total_bounding_rectangle)
            blocks: list[int] = []

            def add(block: int, _: object) -> bool:
                blocks.append(block)
                return False  # one is enough

            content.enumerate_subblocks_subset(add, plane=plane, roi=area)
            if not blocks:  # libCZI reads a plane without any pixels as zeros
                raise ValueError(f"plane {plane} is missing")
            image = content.read(plane=plane, scene=scene)
            return image[..., ::-1]  # BGR, or one sample

        def scene(series: int) -> Scene:
            area = scenes[series][1] if scenes else content.total_bounding_rectangle
            kinds = set(types.values())
            if len(kinds) > 1 or not kinds <= set(_CZI_TYPES):
                raise InputError(
                    f"{where}: {file} contains pixels of type {', '.join(sorted(kinds))}; export "
                    "it as OME-TIFF"
                )
            dtype, samples = _CZI_TYPES[kinds.pop()]
            shape = (area.h, area.w)
            return Scene(
                sizes,
                shape,
                np.dtype(dtype),
                samples,
                names,
                lambda position: read_plane(series, position),
                pixel_size,
            )

        yield Scenes(max(len(scenes), 1), scene)


def _czi_names(metadata: str) -> list[str]:
    """Return the channel names of CZI metadata; none if a channel has no name."""
    channels = ElementTree.fromstring(metadata).findall(
        "./Metadata/Information/Image/Dimensions/Channels/Channel"
    )
    names = [channel.get("Name", "") for channel in channels]
    return names if all(names) else []


@contextmanager
def _lif(file: str, where: str) -> Iterator[Scenes]:
    import liffile

    with (
        open_file(file, where, header=True) as stream,
        liffile.LifFile(cast(IO[bytes], stream), squeeze=False) as content,
    ):
        # Other Leica files (XLIF, XLEF) name files in other folders, which are not opened.
        if content.type not in (liffile.LifFileType.LIF, liffile.LifFileType.LOF):
            raise ValueError(f"it is {content.type.name}")
        images: list[Any] = list(content.images)

        def scene(number: int) -> Scene:
            image = images[number]
            block = image.memory_block
            if block.offset + block.size > stream.seek(0, os.SEEK_END):
                raise ValueError("it ends before the end of its pixels")
            sizes = dict(image.sizes)
            shape, samples = (sizes.pop("Y"), sizes.pop("X")), sizes.pop("S", 1)
            if image.frames.frame_dims not in (("Y", "X"), ("Y", "X", "S")):
                raise ValueError(f"planes have axes {image.frames.frame_dims}")

            def read_frame(index: dict[str, int]) -> np.ndarray:
                position = {axis: place for axis, place in index.items() if axis in image.sizes}
                return image.frame(**position).reshape(*shape, samples)

            # The length in meters is from the first to the last pixel center.
            pixel_size = common_size(
                micrometers(axis.length / max(axis.number_elements - 1, 1), "m")
                for axis in image._dimensions
                if axis.label in ("X", "Y")
            )
            return Scene(sizes, shape, image.dtype, samples, [], read_frame, pixel_size)

        yield Scenes(len(images), scene)


class _Kind(NamedTuple):
    name: str
    open: Callable[[str, str], AbstractContextManager[Scenes]]


#: Suffix → reader.
KINDS: dict[str, _Kind] = {
    ".nd2": _Kind("Nikon ND2", _nd2),
    ".czi": _Kind("Zeiss CZI", _czi),
    ".lif": _Kind("Leica LIF", _lif),
    ".lof": _Kind("Leica LOF", _lif),
}
