"""Illumination correction: divide the images by one illumination function per plate and channel.

The functions come from the Cell Painting Gallery (`PLATE_IllumCHANNEL.npy`, written by
CellProfiler) or are estimated from the plate. As in CellProfiler, a function is about 1 in the
darkest region of the image and larger elsewhere. The division therefore never exceeds the range of
the stored data type.

Estimation (one plate, one channel):

1. Downsample up to 200 sites to a grid of 128 pixels, and divide each grid by its median.
2. Take the median over sites at every grid pixel. Where cells cover a pixel in fewer than half of
   the sites, this median is the background.
3. Fit a polynomial of degree 6 in row and column to the logarithm of the median grid, with Huber
   weights (iteratively reweighted least squares), so that remaining cells and well borders have
   little influence.
4. Evaluate the polynomial at full resolution and divide by its 2nd percentile.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Shaped, UInt

from data_prep.process_pool import TaskPool
from data_prep.site import Site
from data_prep.sources import Plane, read_planes
from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic, make_folder
from perturbjax.core.progress import track
from perturbjax.dataset import LARGEST_SITE

#: Value of `--illumination` for functions estimated from the plate.
ESTIMATE = "estimate"
#: Maximum size of a file in bytes (8 bytes per pixel and the header), and of a file name.
LARGEST_FUNCTION, LONGEST_NAME = 8 * LARGEST_SITE + 4096, 255
#: Version of the estimation; increase it when the same images yield another function.
VERSION = 1
#: Minimum number of sites for an estimate, and maximum number of sites read per plate (evenly
#: spaced).
MIN_SITES, MAX_SITES = 10, 200
#: Longer side in pixels of the downsampled grids. Illumination varies slowly, so a coarse grid
#: suffices.
GRID = 128
#: Degree of the polynomial. On the 72 images of sbs_transfluor, degrees 2, 4 and 6 give held-out
#: edge-to-center ratios of 0.981, 0.982 and 0.993, and standard deviations over image blocks of
#: 0.069, 0.058 and 0.050.
DEGREE = 6
#: Percentile of the function that is scaled to 1 (CellProfiler's robust minimum).
MINIMUM_PERCENTILE = 2
#: Iterations of the reweighted least-squares fit.
ITERATIONS = 5


@dataclass(frozen=True)
class EstimateTask:
    """Inputs of one illumination estimate: a plate and a channel."""

    plate: str
    channel: str
    sites: tuple[Site, ...]
    """Sites with this channel only."""
    shape: tuple[int, int]
    """(height, width) of the images."""
    out: Path
    """File to write (`.npy`)."""


def find_functions(
    folder: Path, plates: Iterable[str], channels: Sequence[str]
) -> dict[tuple[str, str], Path]:
    """Find `FOLDER/PLATE/PLATE_IllumCHANNEL.npy` or `FOLDER/PLATE_IllumCHANNEL.npy` for plates and
    channels.

    Returns:
        (plate, channel) → file.

    Raises:
        InputError: The folder or the file of a plate and channel does not exist.
    """
    if not folder.is_dir():
        raise InputError(
            f"--illumination {folder}: no such folder; pass a folder of functions, or {ESTIMATE}"
        )
    files = {}
    for plate in plates:
        for channel in channels:
            name = f"{plate}_Illum{channel}.npy"
            # A plate name with a slash could lead outside of the folder.
            is_name = Path(name).name == name and Path(plate).name == plate
            if not is_name or len(os.fsencode(name)) > LONGEST_NAME:
                raise InputError(
                    f"--illumination {folder}: plate {plate[:99]!r} is not allowed in a file name; "
                    "rename the plate"
                )
            paths = [path for path in (folder / plate / name, folder / name) if path.is_file()]
            if not paths:
                raise InputError(
                    f"--illumination {folder}: {name} is missing (searched {folder / plate} and "
                    f"{folder}); every plate and channel needs a function. Use --illumination "
                    f"{ESTIMATE} to estimate the functions from the images"
                )
            files[plate, channel] = _require_small(paths[0].resolve())
    return files


def _require_small(path: Path) -> Path:
    """Refuse files that are larger than any function: their checksum would take minutes."""
    if (size := path.stat().st_size) > LARGEST_FUNCTION:
        raise InputError(
            f"{path}: has {size} bytes, more than an illumination function (at most "
            f"{LARGEST_FUNCTION})"
        )
    return path


@functools.lru_cache(maxsize=12)  # the channels of one or two plates, a few megabytes each
def read_function(path: Path) -> Float32[np.ndarray, "h w"]:
    """Read an illumination function; the returned array is read-only.

    Raises:
        InputError: The file is not a two-dimensional array of finite, positive numbers.
    """
    try:
        # Memory-mapped, so that the shape is checked before the values are read. Pickles could run
        # code.
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        is_image = (
            isinstance(values, np.ndarray) and values.ndim == 2 and values.dtype.kind in "fiu"
        )
        is_image = is_image and 0 < values.size <= LARGEST_SITE
        function = np.asarray(values, np.float32) if is_image else None
    except Exception as error:  # numpy raises many types for files that are not arrays
        raise InputError(f"{path}: cannot be read as an illumination function ({error})") from error
    if function is None:
        raise InputError(
            f"{path}: not an illumination function; an array of numbers with shape "
            "(height, width) is required"
        )
    if not (np.isfinite(function) & (function > 0)).all():
        raise InputError(
            f"{path}: contains values that are not finite and positive; images cannot be divided "
            "by them"
        )
    # The cache returns the same array to all callers.
    function.setflags(write=False)
    return function


def divide(
    plane: UInt[np.ndarray, "h w"], function: Float[np.ndarray, "h w"]
) -> UInt[np.ndarray, "h w"]:
    """Divide a plane by its illumination function; round and clip to the range of its data type."""
    return np.clip(np.rint(plane / function), 0, np.iinfo(plane.dtype).max).astype(plane.dtype)


def correct(
    planes: Mapping[Plane, UInt[np.ndarray, "_ _"]], site: Site
) -> dict[Plane, UInt[np.ndarray, "_ _"]]:
    """Divide the planes of a site by its illumination functions, if it has any.

    Raises:
        InputError: A function and its plane differ in size.
    """
    corrected = dict(planes)
    for plane, path in site.function_of.items():
        if plane in planes:
            corrected[plane] = divide(planes[plane], read_matching(path, planes[plane].shape, site))
    return corrected


def read_matching(path: Path, shape: tuple[int, ...], site: Site) -> Float32[np.ndarray, "h w"]:
    """Read an illumination function and check that it has the size of the site's images.

    Raises:
        InputError: The file cannot be used, or the sizes differ.
    """
    function = read_function(path)
    if function.shape != shape:
        raise InputError(
            f"{site.where}: the images have shape {shape}, but the illumination function {path} "
            f"has shape {function.shape}; pass functions of this plate at this size"
        )
    return function


def estimate_function(task: EstimateTask) -> str:
    """Estimate the illumination function of one plate and channel, and write it as `.npy`.

    Returns:
        SHA-256 of the function's values.

    Raises:
        InputError: A site cannot be read, or fewer than `MIN_SITES` sites contain signal.
    """
    grids = []
    for site in task.sites:
        grid = _downsample(read_planes(site.stored, site.where)[site.stored[0]])
        # The division makes sites of different brightness comparable. Empty images are left out.
        if (median := float(np.median(grid))) > 0:
            grids.append(grid / median)
    if len(grids) < MIN_SITES:
        raise InputError(
            f"--illumination {ESTIMATE}: plate {task.plate}, channel {task.channel}: only "
            f"{len(grids)} sites contain signal ({MIN_SITES} required); pass a folder of "
            "functions, or omit --illumination"
        )
    function = fit_surface(np.median(grids, axis=0), task.shape)
    with atomic(task.out) as temporary:
        np.save(temporary, function)
    return hashlib.sha256(function.tobytes()).hexdigest()


def _downsample(plane: UInt[np.ndarray, "h w"]) -> Float32[np.ndarray, "_ _"]:
    """Average a plane to `GRID` pixels along its longer side."""
    from skimage.transform import resize_local_mean

    scale = min(GRID / max(plane.shape), 1.0)
    shape = tuple(max(round(size * scale), 1) for size in plane.shape)
    return resize_local_mean(plane.astype(np.float32), shape, preserve_range=True).astype(
        np.float32
    )


def fit_surface(
    background: Float[np.ndarray, "_ _"], shape: tuple[int, int]
) -> Float32[np.ndarray, "h w"]:
    """Fit a smooth surface to a background image and evaluate it at another size.

    Args:
        background: Median background of the plate, at low resolution.
        shape: (height, width) of the result.

    Returns:
        exp(polynomial), scaled so that its 2nd percentile is 1.
    """
    # In the logarithm the function is a sum of terms, and exp makes the result positive.
    values = np.log(np.maximum(background, np.finfo(np.float32).tiny)).astype(np.float64).ravel()
    terms = _polynomial_terms(background.shape)
    weights = np.ones_like(values)
    for _ in range(ITERATIONS):
        # Weighted least squares: rows are scaled by the square root of their weights.
        fitted = np.linalg.lstsq(terms * weights[:, None], values * weights, rcond=None)[0]
        residuals = np.abs(values - terms @ fitted)
        # Huber weights: 1 within 1.5 robust standard deviations (1.4826 MAD), decreasing beyond.
        limit = max(1.5 * 1.4826 * float(np.median(residuals)), 1e-9)
        weights = np.sqrt(1 / np.maximum(residuals / limit, 1))
    function = np.exp(_polynomial_terms(shape) @ fitted).reshape(shape)
    return (function / np.percentile(function, MINIMUM_PERCENTILE)).astype(np.float32)


def _polynomial_terms(shape: tuple[int, ...]) -> Float[np.ndarray, "_ _"]:
    """Products of powers of row and column (both from -1 to 1) up to total degree `DEGREE`."""
    row, column = (2 * (np.arange(size) + 0.5) / size - 1 for size in shape)
    # 28 terms for degree 6.
    pairs = [(i, j) for i in range(DEGREE + 1) for j in range(DEGREE + 1 - i)]
    return np.stack([np.outer(row**i, column**j).ravel() for i, j in pairs], axis=-1)


def edge_to_center_ratio(image: Shaped[np.ndarray, "h w"]) -> float:
    """Return the background intensity at the image edge divided by that at the center.

    Both are lower quartiles: of pixels farther than 80 % and of pixels nearer than 25 % of the
    distance from the center to a corner.
    """
    rows, columns = (2 * (np.arange(size) + 0.5) / size - 1 for size in image.shape)
    # 0 at the center, 1 in a corner.
    radius = np.hypot(rows[:, None], columns[None, :]) / np.sqrt(2)
    edge, center = np.percentile(image[radius > 0.8], 25), np.percentile(image[radius < 0.25], 25)
    return float(edge / max(center, 1e-9))


def check_functions(sites: Iterable[Site], shapes: Iterable[tuple[int, int]]) -> None:
    """Read all illumination functions of sites before the segmentation starts.

    Raises:
        InputError: A function cannot be used, or differs in size from the images of a site.
    """
    for site, shape in zip(sites, shapes, strict=True):
        for path in site.functions:
            read_matching(path, shape, site)


def estimate_functions(
    pool: TaskPool, sites: Sequence[Site], shapes: Sequence[tuple[int, int]], folder: Path
) -> dict[tuple[str, str], tuple[Path, str]]:
    """Estimate the illumination functions of all plates and channels.

    Args:
        pool: Workers, one task per plate and channel.
        sites: All sites, without illumination functions.
        shapes: (height, width) of each site.
        folder: Folder to write the functions to.

    Returns:
        (plate, channel) → (file, SHA-256).

    Raises:
        InputError: A plate has too few sites, sites of different sizes, or a site that cannot be
        read.
    """
    make_folder(folder)
    by_plate: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        by_plate.setdefault(site.plate, []).append(index)
    tasks = []
    for plate, indices in by_plate.items():
        if len(indices) < MIN_SITES:
            raise InputError(
                f"--illumination {ESTIMATE}: plate {plate} has {len(indices)} sites ({MIN_SITES} "
                "required); pass a folder of functions, or omit --illumination"
            )
        if len(sizes := {shapes[index] for index in indices}) > 1:
            raise InputError(
                f"--illumination {ESTIMATE}: sites of plate {plate} have {len(sizes)} different "
                "sizes, so one function cannot fit all; omit --illumination, or build them apart"
            )
        # Evenly spaced, so that all regions of the plate contribute.
        evenly = np.unique(np.linspace(0, len(indices) - 1, MAX_SITES).round().astype(int))
        sample = [sites[indices[k]] for k in evenly]
        for channel in dict.fromkeys(sample[0].channels):
            # Plate names may contain characters that are not allowed in file names.
            name = hashlib.sha256(f"{plate}\0{channel}".encode()).hexdigest()
            channel_sites = tuple(site.single_channel(channel) for site in sample)
            out = folder / f"{name}.npy"
            tasks.append(EstimateTask(plate, channel, channel_sites, shapes[indices[0]], out))
    checksums = pool.in_order(estimate_function, tasks)
    progress = track(checksums, total=len(tasks), label="Estimating illumination", unit="functions")
    return {
        (task.plate, task.channel): (task.out, checksum)
        for task, checksum in zip(tasks, progress, strict=True)
    }


def illumination_facts(
    illumination: str, checksums: Mapping[tuple[str, str], str]
) -> dict[str, Any]:
    """Return the provenance entry of the illumination correction; empty if there is none.

    Args:
        illumination: Value of `--illumination`.
        checksums: (plate, channel) → SHA-256 of the function.
    """
    if not illumination:
        return {}
    method = {"how": "functions"}
    if illumination == ESTIMATE:
        method = {"how": ESTIMATE, "version": str(VERSION)}
    by_plate: dict[str, dict[str, str]] = {}
    for (plate, channel), checksum in checksums.items():
        by_plate.setdefault(plate, {})[channel] = checksum
    return {"illumination": {**method, "sha256": by_plate}}
