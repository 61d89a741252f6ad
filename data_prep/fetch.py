"""`perturbjax fetch`: download a plate of the public Cell Painting Gallery over HTTPS.

`gallery_listing.py` describes the layout of the gallery and faults of its tables.
"""

from __future__ import annotations

import fcntl
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd

from data_prep import gallery_listing as gallery
from data_prep.download import download_if_there, in_parallel
from data_prep.fetch_options import FetchConfig
from data_prep.fetch_tables import PlateImages, plate_table, require_file_name
from data_prep.gallery_listing import GALLERY
from data_prep.sources.files import LARGEST_FILE
from data_prep.sources.remote import redacted
from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic, make_folder
from perturbjax.core.messages import console
from perturbjax.core.plates import SITE, WELL
from perturbjax.core.progress import track


def fetch(options: FetchConfig) -> None:
    """Download images, then write load_data.csv with the treatments.

    The table is written last, so it exists only if all its files do. Sites with missing images are
    left out; the images are listed in missing_images.csv.

    Raises:
        InputError: The plate, a channel or a well is unknown, the gallery cannot be reached, or the
            output cannot be written.
    """
    accession, source, batch = gallery.full_names(options.accession, options.source, options.batch)
    options = replace(options, accession=accession, source=source, batch=batch)
    for flag in ("plate", "accession", "source", "batch"):
        require_file_name(getattr(options, flag), f"--{flag}")
    make_folder(options.out)
    with exclusive(options.out):
        _fetch(options)


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Lock a folder for one fetch, and remove the partial files of an interrupted one.

    Raises:
        InputError: Another fetch is running in the folder.
    """
    with open(out / ".fetching", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"--out {out}: another fetch is running in this folder; wait for it"
            ) from error
        # Temporary files of a killed fetch. The lock ensures that no other fetch is writing them.
        for partial in [path for pattern in (".*.tmp.*", ".*.tmp") for path in out.rglob(pattern)]:
            partial.unlink(missing_ok=True)
        yield
        (out / ".fetching").unlink(missing_ok=True)


def _fetch(options: FetchConfig) -> None:
    table, images = plate_table(options)
    for channel, names in images.names.items():
        for row, name in enumerate(names, 1):
            require_file_name(
                name, f"load_data.csv of {options.plate}, site {row}, channel {channel}"
            )
    if options.illumination:
        _fetch_illumination(options, list(images.names))
    # The table then names keys in the gallery instead of local folders.
    if options.tables_only:
        _write_table(options, table, images, images.keys)
        url = "s3://cellpainting-gallery" if options.base_url == GALLERY else options.base_url
        console.print(
            f"{options.out}: {len(table)} sites; next step: perturbjax build --load-data "
            f"{options.out / 'load_data.csv'} --images {redacted(url)}"
        )
        return
    complete, received = _fetch_images(options, table, images)
    # Positions of complete sites, to filter the lists of files like the table.
    selected = [row for row, whole in enumerate(complete) if whole]
    images = PlateImages(
        *(
            {channel: [values[row] for row in selected] for channel, values in part.items()}
            for part in (images.names, images.keys, images.folders)
        )
    )
    table = table[complete].reset_index(drop=True)
    _write_table(options, table, images, images.folders)
    count = len(table) * len(images.names)
    console.print(
        f"{options.out}: {len(table)} sites, {count} images ({received / 1e9:.2f} GB downloaded)"
    )


def _fetch_images(
    options: FetchConfig, table: pd.DataFrame, images: PlateImages
) -> tuple[pd.Series, int]:
    """Download the images of all sites.

    Returns:
        Whether each site has all its images, and the number of bytes downloaded.
    """
    paths = {
        channel: [
            options.out / folder / name
            for folder, name in zip(images.folders[channel], names, strict=True)
        ]
        for channel, names in images.names.items()
    }
    # The path identifies an image: two sites can share a file, which is downloaded once.
    urls = {
        path: f"{options.base_url}/{urllib.parse.quote(f'{key}/{path.name}')}"
        for channel, column in paths.items()
        for path, key in zip(column, images.keys[channel], strict=True)
    }
    for folder in {path.parent for path in urls}:
        make_folder(folder)
    # Files have their final names only when complete, so existing ones need no check.
    missing = {path: url for path, url in urls.items() if not path.is_file()}
    present = len(urls) - len(missing)
    if present:
        console.print(f"info: resuming, {present} of {len(urls)} images exist already")
    # A result is the size of the image in bytes, or None if the gallery does not have it.
    results = in_parallel(
        lambda item: download_if_there(item[1], item[0], LARGEST_FILE),
        missing.items(),
        options.downloads,
    )
    progress = track(
        results, total=len(urls), label="Downloading images", unit="images", done=present
    )
    sizes = dict(zip(missing, progress, strict=True))
    absent = {path: urls[path] for path, size in sizes.items() if size is None}
    # A site is complete if no channel lacks its image.
    complete = pd.Series(True, index=table.index)
    for column in paths.values():
        complete &= pd.Series([path not in absent for path in column])
    _report_missing(options, absent, table, complete)
    return complete, sum(size or 0 for size in sizes.values())


def _report_missing(
    options: FetchConfig, absent: dict[Path, str], table: pd.DataFrame, complete: pd.Series
) -> None:
    """Report sites with images missing in the gallery (jump-cellpainting/datasets#78)."""
    listed = options.out / "missing_images.csv"
    if not absent:
        listed.unlink(missing_ok=True)
        return
    if not complete.any():
        raise InputError(
            f"{redacted(next(iter(absent.values())))}: no site has all its images in the gallery "
            "(HTTP 404); check --plate"
        )
    with atomic(listed) as temporary:
        urls = [redacted(url) for url in absent.values()]
        pd.DataFrame({"url": urls}).to_csv(temporary, index=False)
    first = table[~complete].iloc[0]
    console.print(
        f"warning: {int((~complete).sum())} of {len(table)} sites lack images in the gallery "
        f"({len(absent)} images, the first of well {first[WELL]}, site {first[SITE]}) and are left "
        f"out; see {listed}"
    )


def _write_table(
    options: FetchConfig, table: pd.DataFrame, images: PlateImages, folders: dict[str, list[str]]
) -> None:
    for channel, names in images.names.items():
        table[f"FileName_Orig{channel}"] = names
        table[f"PathName_Orig{channel}"] = folders[channel]
    with atomic(options.out / "load_data.csv") as temporary:
        table.to_csv(temporary, index=False)


def _fetch_illumination(options: FetchConfig, channels: list[str]) -> None:
    """Download the illumination functions of a plate; report channels without one."""
    folder = make_folder(options.out / "illum" / options.plate)
    for channel in channels:
        name = require_file_name(f"{options.plate}_Illum{channel}.npy", "load_data.csv")
        key = f"{options.root}/images/{options.batch}/illum/{options.plate}/{name}"
        url = f"{options.base_url}/{urllib.parse.quote(key)}"
        if download_if_there(url, folder / name, LARGEST_FILE) is None:
            console.print(
                f"warning: the gallery has no illumination function of channel {channel} of "
                f"{options.plate}"
            )
