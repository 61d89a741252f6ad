"""Speed of reading the pixels of a site, by file format and location.

    python -m experiments.bench --only sources --out runs/bench [--quick]

A site is one real JUMP field (1080 x 1080 pixels, five channels). Each variant reads copies of it
one after the other in one process, like a worker of `perturbjax build`. S3 is a moto server in a
separate process on the loopback interface, so that requests and copies count, but no network.
`spread` is minimum and maximum of the repeats divided by their median. Needs the data folder named
by PERTURBJAX_SHARED, and the extras zarr and test.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from data_prep.sources import Plane, probe_planes, read_planes
from data_prep.sources.zarrs import JUMP_LITE_CHANNELS
from experiments.bench.tables import CannotRun
from perturbjax.core.messages import console

#: Channel -> number in the file name.
FILES = {"AGP": 1, "DNA": 5, "ER": 4, "Mito": 2, "RNA": 3}
#: Copies of the field and repeats, each in the full and in the quick benchmark.
COPIES, REPEATS = (12, 2), (5, 2)
BUCKET = "bench"


def run(quick: bool) -> list[dict[str, Any]]:
    """Read every format from every location.

    Raises:
        CannotRun: the data does not exist.
    """
    shared = (
        Path(os.environ.get("PERTURBJAX_SHARED", Path(__file__).resolve().parents[3] / "shared"))
        / "data/jump_fov"
    )
    if not shared.is_dir():
        raise CannotRun(
            f"no images in {shared}: set PERTURBJAX_SHARED to the folder that contains data/"
        )
    contents = {
        channel: (shared / f"r01c02f01p01-ch{n}sk1fk1fl1.tiff").read_bytes()
        for channel, n in FILES.items()
    }
    image = np.stack(
        [tifffile.imread(shared / f"r01c02f01p01-ch{n}sk1fk1fl1.tiff") for n in FILES.values()]
    )
    rows = []
    with tempfile.TemporaryDirectory() as temporary, serve_s3() as upload:
        for name, write in _writers(image, contents).items():
            folder = Path(temporary) / name.replace(" ", "_")
            folder.mkdir()
            sites = [write(folder, site) for site in range(COPIES[quick])]
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / len(
                sites
            )
            for location in ("disk", "S3, loopback"):
                root = str(folder) if location == "disk" else upload(folder)
                rows.append(
                    {
                        "format": name,
                        "location": location,
                        "MB per site": size / 1e6,
                        **_timed(root, sites, image, quick),
                    }
                )
                console.print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    return rows


#: Writes a site to a folder and returns channel -> file.
Writer = Callable[[Path, int], dict[str, str]]


def _writers(image: np.ndarray, contents: dict[str, bytes]) -> dict[str, Writer]:
    import zarr

    def tiff(folder: Path, site: int) -> dict[str, str]:
        for channel, content in contents.items():
            (folder / f"{site}_{channel}.tiff").write_bytes(content)
        return {channel: f"{site}_{channel}.tiff" for channel in contents}

    def ome_tiff(folder: Path, site: int) -> dict[str, str]:
        metadata = {"axes": "CYX", "Channel": {"Name": list(FILES)}}
        settings: dict[str, Any] = {
            "compression": "zlib",
            "photometric": "minisblack",
            "metadata": metadata,
        }
        tifffile.imwrite(folder / f"{site}.ome.tiff", image, ome=True, **settings)
        return dict.fromkeys(FILES, f"{site}.ome.tiff")

    def ome_zarr(folder: Path, site: int) -> dict[str, str]:
        group = zarr.open_group(folder / "plate.zarr" / str(site), mode="w")
        scales = {"datasets": [{"path": "0"}], "axes": [{"name": axis} for axis in "cyx"]}
        group.attrs["ome"] = {
            "multiscales": [scales],
            "omero": {"channels": [{"label": name} for name in FILES]},
        }
        group.create_array("0", data=image, chunks=(1, *image.shape[1:]))
        return dict.fromkeys(FILES, f"plate.zarr/{site}")

    def lite(folder: Path, site: int, **settings: Any) -> dict[str, str]:
        name = f"source_4__batch__plate__A02__{site}"
        array = zarr.create_array(
            folder / "lite.zarr",
            name=name,
            shape=image.shape,
            chunks=image.shape,
            dtype="uint16",
            **settings,
        )
        array[:] = image[[list(FILES).index(channel) for channel in JUMP_LITE_CHANNELS]]
        return dict.fromkeys(FILES, f"lite.zarr/{name}")

    def lite_zstd(folder: Path, site: int) -> dict[str, str]:
        blosc = zarr.codecs.BloscCodec(cname="zstd", clevel=9, shuffle="bitshuffle")
        return lite(folder, site, compressors=blosc, zarr_format=3)

    def lite_jxl(folder: Path, site: int) -> dict[str, str]:
        from imagecodecs import numcodecs

        numcodecs.register_codecs(verbose=False)
        return lite(
            folder, site, compressors=numcodecs.Jpegxl(lossless=False, distance=1.0), zarr_format=2
        )

    return {
        "TIFF of the microscope": tiff,
        "OME-TIFF, deflate": ome_tiff,
        "OME-Zarr, Zstd": ome_zarr,
        "JUMP-Lite, Zstd": lite_zstd,
        "JUMP-Lite, JPEG XL 1.0": lite_jxl,
    }


def _timed(
    root: str, sites: list[dict[str, str]], image: np.ndarray, quick: bool
) -> dict[str, Any]:
    """Time repeated reading of all sites, and one probe of each."""
    planes = [
        [Plane(f"{root}/{file}", channel) for channel, file in site.items()] for site in sites
    ]
    pixels = read_planes(planes[0], "bench")  # also imports and connects
    lossy = "Lite" in root and not np.array_equal(pixels[planes[0][0]], image[0])
    start = time.perf_counter()
    for site in planes:
        probe_planes(site, "bench")
    probed = (time.perf_counter() - start) / len(planes)
    seconds, processor = [], time.process_time()
    for _ in range(REPEATS[quick]):
        start = time.perf_counter()
        for site in planes:
            read_planes(site, "bench")
        seconds.append((time.perf_counter() - start) / len(planes))
    spent = (time.process_time() - processor) / len(planes) / REPEATS[quick]
    median = statistics.median(seconds)
    return {
        "pixels": "lossy" if lossy else "unchanged",
        "probe ms": 1000 * probed,
        "read sites/s": 1 / median,
        "spread": f"{min(seconds) / median:.2f} to {max(seconds) / median:.2f}",
        "CPU ms per site": 1000 * spent,
    }


@contextmanager
def serve_s3() -> Iterator[Callable[[Path], str]]:
    """Start an S3 server on the loopback interface; yield a function that uploads a folder to it.

    The function returns the URL of the folder.
    """
    import boto3

    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    try:
        url = next(
            match[0]
            for line in process.stderr
            if (match := re.search(r"http://127[.0-9]+:[0-9]+", line))
        )
        threading.Thread(target=process.stderr.read, daemon=True).start()
        keys = {
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_ENDPOINT_URL": url,
        }
        os.environ.update(keys)
        client = boto3.client("s3", region_name="us-east-1", endpoint_url=url)
        client.create_bucket(Bucket=BUCKET)

        def upload(folder: Path) -> str:
            for path in folder.rglob("*"):
                if path.is_file():
                    client.upload_file(
                        str(path), BUCKET, f"{folder.name}/{path.relative_to(folder)}"
                    )
            return f"s3://{BUCKET}/{folder.name}"

        yield upload
    finally:
        process.kill()
        process.wait()
