"""Uneven light: the function of each plate and channel that its images are divided by.

Functions are those of the Cell Painting Gallery (`PLATE_IllumCHANNEL.npy`, made by CellProfiler), or are estimated from
the plate itself. As CellProfiler's they are about 1 where the plate is darkest and more where it is brighter, so that
dividing by them never leaves the range of the stored type.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float32, Shaped, UInt

from data_prep.sources import Plane, read_planes
from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic, make_folder
from perturbjax.core.progress import track
from perturbjax.dataset import LARGEST_SITE

if TYPE_CHECKING:
    from data_prep.process_pool import TaskPool
    from data_prep.site_tasks import Site

#: What `--illumination` says for functions that are made from the plate itself.
ESTIMATE = "estimate"
#: Raised when the same images would be given another function.
VERSION = 1
#: Sites a plate must have to be estimated from, and the most that are read of it, evenly chosen.
LEAST_SITES, MOST_SITES = 10, 200
#: Pixels of the longer side that sites are averaged down to before their median is taken: light varies slowly.
GRID = 128
#: Degree of the polynomial of the logarithm of light. On the 72 images of sbs_transfluor 2, 4 and 6 leave a held-out
#: ratio of edge to centre of 0.981, 0.982 and 0.993, and an unevenness of blocks of 0.069, 0.058 and 0.050.
DEGREE = 6
#: The function is 1 at this percentile of its values: CellProfiler's robust minimum.
MINIMUM_PERCENTILE = 2
#: Rounds of reweighting that keep what is no light (a well's rim, cells that lie alike on most sites) from the fit.
ROUNDS = 5


@dataclass(frozen=True)
class Estimate:
    """One function to be made."""

    plate: str
    channel: str
    sites: tuple[Site, ...]
    """Each with this one channel stored, and no other."""
    shape: tuple[int, int]
    out: Path


def given(
    folder: Path, plates: Iterable[str], channels: Sequence[str]
) -> dict[tuple[str, str], Path]:
    """Where the functions of plates and channels lie: `FOLDER/PLATE/PLATE_IllumCHANNEL.npy`, or without the `PLATE/`.

    Raises:
        InputError: there is no such folder, or it lacks one.
    """
    if not folder.is_dir():
        raise InputError(f"--illumination {folder}: no such folder; name one, or {ESTIMATE}")
    found = {}
    for plate in plates:
        for channel in channels:
            name = f"{plate}_Illum{channel}.npy"
            if Path(name).name != name or Path(plate).name != plate:
                raise InputError(
                    f"--illumination {folder}: plate {plate!r} cannot be part of a file's name; rename it"
                )
            paths = [path for path in (folder / plate / name, folder / name) if path.is_file()]
            if not paths:
                raise InputError(
                    f"--illumination {folder}: has no {name}, neither there nor in {plate}; every plate and channel "
                    f"needs its function ({ESTIMATE} makes them from the images)"
                )
            found[plate, channel] = paths[0].resolve()
    return found


@functools.lru_cache(maxsize=12)  # the channels of a plate or two, some megabytes each
def read_function(path: Path) -> Float32[np.ndarray, "h w"]:
    """A function as it divides.

    Raises:
        InputError: it is no array of two dimensions, or a value of it is not finite and positive.
    """
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        sound = (
            isinstance(values, np.ndarray) and values.ndim == 2 and 0 < values.size <= LARGEST_SITE
        )
        sound = sound and values.dtype.kind in "fiu"
        function = np.asarray(values, np.float32) if sound else None
    except Exception as error:  # numpy raises many kinds for files that are no arrays
        raise InputError(f"{path}: cannot be read as an illumination function ({error})") from error
    if function is None:
        raise InputError(
            f"{path}: is no illumination function: an array (height, width) of numbers is needed"
        )
    if not (np.isfinite(function) & (function > 0)).all():
        raise InputError(
            f"{path}: holds values that are not finite and positive; no image can be divided by them"
        )
    function.setflags(write=False)
    return function


def divide(
    plane: UInt[np.ndarray, "h w"], function: Float[np.ndarray, "h w"]
) -> UInt[np.ndarray, "h w"]:
    """A plane under even light: rounded, and kept in the range of its type."""
    return np.clip(np.rint(plane / function), 0, np.iinfo(plane.dtype).max).astype(plane.dtype)


def correct(
    planes: Mapping[Plane, UInt[np.ndarray, "_ _"]], site: Site
) -> dict[Plane, UInt[np.ndarray, "_ _"]]:
    """The planes of a site under even light; as they are where it has no functions.

    Raises:
        InputError: a function has another size than the plane.
    """
    corrected = dict(planes)
    for key, path in dict(
        zip((*site.stored, *site.segmented), site.functions, strict=False)
    ).items():
        if key in planes:
            function = read_function(path)
            require_size(function, planes[key].shape, site, path)
            corrected[key] = divide(planes[key], function)
    return corrected


def require_size(
    function: Shaped[np.ndarray, "_ _"], shape: tuple[int, ...], site: Site, path: Path
) -> None:
    """Refuse a function of another size than the images that it is to divide.

    Raises:
        InputError: names the site and the function.
    """
    if function.shape != shape:
        raise InputError(
            f"{site.where}: its images are {shape}, but the illumination function {path} is {function.shape}; "
            "give the functions of this plate at this size"
        )


def estimate(task: Estimate) -> str:
    """Make a plate's function of a channel from its sites and write it as `.npy`; its SHA-256.

    The median over sites, each divided by its own median, is background where cells cover a pixel in fewer than half of
    them; a polynomial, fitted so that what departs from it counts less, is all that is kept of it.

    Raises:
        InputError: a site cannot be read, or too few of them show anything.
    """
    grids = []
    for site in task.sites:
        grid = _averaged(read_planes(site.stored, site.where)[site.stored[0]])
        if (middle := float(np.median(grid))) > 0:
            grids.append(grid / middle)
    if len(grids) < LEAST_SITES:
        raise InputError(
            f"--illumination {ESTIMATE}: plate {task.plate}, channel {task.channel}: {len(grids)} of its sites show "
            f"light, and {LEAST_SITES} are needed; give functions in a folder, or leave it out"
        )
    function = smooth_light(np.median(grids, axis=0), task.shape)
    with atomic(task.out) as temporary:
        np.save(temporary, function)
    return hashlib.sha256(function.tobytes()).hexdigest()


def _averaged(plane: UInt[np.ndarray, "h w"]) -> Float32[np.ndarray, "_ _"]:
    from skimage.transform import resize_local_mean

    scale = min(GRID / max(plane.shape), 1.0)
    shape = tuple(max(round(side * scale), 1) for side in plane.shape)
    return resize_local_mean(plane.astype(np.float32), shape, preserve_range=True).astype(
        np.float32
    )


def smooth_light(
    light: Float[np.ndarray, "_ _"], shape: tuple[int, int]
) -> Float32[np.ndarray, "h w"]:
    """The polynomial in rows and columns that the logarithm of `light` follows, at another size, about 1 or more."""
    values = np.log(np.maximum(light, np.finfo(np.float32).tiny)).astype(np.float64).ravel()
    terms = _terms(light.shape)
    weights = np.ones_like(values)
    for _ in range(ROUNDS):
        fitted = np.linalg.lstsq(terms * weights[:, None], values * weights, rcond=None)[0]
        rest = np.abs(values - terms @ fitted)
        scale = max(
            1.5 * 1.4826 * float(np.median(rest)), 1e-9
        )  # Huber's bound, in robust deviations
        weights = np.sqrt(1 / np.maximum(rest / scale, 1))
    function = np.exp(_terms(shape) @ fitted).reshape(shape)
    return (function / np.percentile(function, MINIMUM_PERCENTILE)).astype(np.float32)


def _terms(shape: tuple[int, ...]) -> Float[np.ndarray, "_ _"]:
    """All products of powers of row and column up to `DEGREE`, from -1 at one edge to 1 at the other."""
    row, column = (2 * (np.arange(side) + 0.5) / side - 1 for side in shape)
    pairs = [(i, j) for i in range(DEGREE + 1) for j in range(DEGREE + 1 - i)]
    return np.stack([np.outer(row**i, column**j).ravel() for i, j in pairs], axis=-1)


def edge_to_centre(image: Shaped[np.ndarray, "h w"]) -> float:
    """Background at the edge over background at the centre: lower quartiles of pixels beyond 80 % and within 25 % of
    the way from the middle to a corner."""
    rows, columns = (2 * (np.arange(side) + 0.5) / side - 1 for side in image.shape)
    way = np.hypot(rows[:, None], columns[None, :]) / np.sqrt(2)
    edge, centre = np.percentile(image[way > 0.8], 25), np.percentile(image[way < 0.25], 25)
    return float(edge / max(centre, 1e-9))


def with_functions(
    sites: list[Site],
    plates: Sequence[str],
    channels: Sequence[str],
    paths: Mapping[tuple[str, str], Path],
) -> list[Site]:
    """Sites that know what each of their planes is divided by; `channels` of what they store and segment, in order."""
    return [
        replace(site, functions=tuple(paths[plate, channel] for channel in channels))
        for site, plate in zip(sites, plates, strict=True)
    ]


def require_sizes(sites: Iterable[Site], shapes: Iterable[tuple[int, int]]) -> None:
    """Look at all functions before anything is segmented.

    Raises:
        InputError: one cannot be used, or has not the size of a site's images.
    """
    for site, shape in zip(sites, shapes, strict=True):
        for path in site.functions:
            require_size(read_function(path), shape, site, path)


def estimate_all(
    pool: TaskPool,
    sites: Sequence[Site],
    plates: Sequence[str],
    channels: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    folder: Path,
) -> dict[tuple[str, str], tuple[Path, str]]:
    """Estimate every plate's functions into a folder: (plate, channel) → file and SHA-256.

    Raises:
        InputError: a plate has too few sites, sites of different sizes, or one that cannot be read.
    """
    make_folder(folder)
    tasks = []
    for plate in dict.fromkeys(plates):
        here = [position for position, name in enumerate(plates) if name == plate]
        if len(here) < LEAST_SITES:
            raise InputError(
                f"--illumination {ESTIMATE}: plate {plate} has {len(here)} sites, and {LEAST_SITES} are needed; "
                "give functions in a folder, or leave it out"
            )
        if len(sizes := {shapes[position] for position in here}) > 1:
            raise InputError(
                f"--illumination {ESTIMATE}: sites of plate {plate} have {len(sizes)} different sizes, and no one "
                "function fits them; leave it out, or build them apart"
            )
        chosen = np.unique(np.linspace(0, len(here) - 1, MOST_SITES).round().astype(int))
        for channel in dict.fromkeys(channels):
            one = tuple(_alone(sites[here[k]], channels.index(channel)) for k in chosen)
            name = hashlib.sha256(
                f"{plate}\0{channel}".encode()
            ).hexdigest()  # plates are not named for files
            tasks.append(Estimate(plate, channel, one, shapes[here[0]], folder / f"{name}.npy"))
    digests = track(
        pool.in_order(estimate, tasks), total=len(tasks), label="estimating light", unit="functions"
    )
    return {
        (task.plate, task.channel): (task.out, digest)
        for task, digest in zip(tasks, digests, strict=True)
    }


def _alone(site: Site, at: int) -> Site:
    """The site with one of its channels, to be read as it is."""
    return replace(
        site, stored=((*site.stored, *site.segmented)[at],), segmented=(), channels=(), functions=()
    )
