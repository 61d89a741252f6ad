"""The bytes of an image file, and the names in a folder, on this machine or behind a URL."""

from __future__ import annotations

import os
import stat
from io import BufferedIOBase
from typing import Any

from data_prep.sources import remote
from perturbjax.core.errors import InputError
from perturbjax.dataset import LARGEST_SITE

#: Bytes a file of one plane may have beyond its pixels, uncompressed.
_HEADER_BYTES = 64 << 20
#: Bytes a file may have that must be read as a whole: two for every pixel.
LARGEST_FILE = 2 * LARGEST_SITE + _HEADER_BYTES


def open_file(file: str, where: str, header: bool = False) -> BufferedIOBase:
    """A file to read and seek in; the caller closes it. With `header` a remote one is read in the pieces needed.

    Raises:
        InputError: it is a folder, a pipe or a device, or cannot be read.
    """
    if remote.is_remote(file):
        return remote.open_remote(file, where, LARGEST_FILE, header)
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise InputError(f"{where}: {file} is not a file, and so not a readable image")
        return open(file, "rb")
    except OSError as error:
        raise InputError(f"{where}: {file} cannot be read ({error.strerror or error})") from error


def read_file(file: str, where: str, most: int = LARGEST_FILE) -> bytes:
    """All bytes of a file.

    Raises:
        InputError: as `open_file`, or it is too large for an image that is decoded as a whole.
    """
    with open_file(file, where) as opened:
        content = _read(opened, most + 1, file, where)
    if len(content) > most:
        raise InputError(
            f"{where}: {file} has more than {most} bytes, more than one plane can; crop or tile it"
        )
    return content


def read_start(file: str, where: str, size: int) -> bytes:
    """The first bytes of a file, for its header.

    Raises:
        InputError: as `open_file`.
    """
    with open_file(file, where, header=True) as opened:
        return _read(opened, size, file, where)


def zarr_store(root: str, where: str) -> Any:
    """A Zarr store, as zarr-python takes it, that is only read.

    Raises:
        InputError: there is no such folder.
    """
    if remote.is_remote(root):
        return remote.remote_zarr(root, where)
    from zarr.storage import LocalStore

    if not os.path.isdir(root):
        raise InputError(f"{where}: {root} is no folder")
    return LocalStore(root, read_only=True)


def names_of_folder(folder: str) -> list[str]:
    """Names of what lies in a folder; none where it is not there, or cannot be listed.

    Raises:
        InputError: a bucket may not be listed, or no try succeeded.
    """
    if remote.is_remote(folder):
        return remote.names_of_prefix(folder, "--images")
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _read(opened: BufferedIOBase, size: int, file: str, where: str) -> bytes:
    try:
        return opened.read(size)
    except OSError as error:
        raise InputError(f"{where}: {file} cannot be read ({error.strerror or error})") from error
