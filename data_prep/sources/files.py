"""Read image files and list folders, on this machine or behind a URL."""

from __future__ import annotations

import os
import stat
from io import BufferedIOBase

from data_prep.sources import remote
from perturbjax.core.errors import InputError
from perturbjax.dataset import LARGEST_SITE

#: Bytes that a file of one plane may have in addition to its uncompressed pixels.
_HEADER_BYTES = 64 << 20
#: Maximum size in bytes of a file that is read as a whole: two bytes per pixel, and the header.
LARGEST_FILE = 2 * LARGEST_SITE + _HEADER_BYTES


def open_file(file: str, where: str, header: bool = False) -> BufferedIOBase:
    """Open a file for reading and seeking; the caller closes it.

    Args:
        file: Path or URL.
        where: Table and row, for messages.
        header: Only the header is needed: a remote file is read in small pieces.

    Raises:
        InputError: It is a folder, pipe or device, or cannot be read.
    """
    if remote.is_remote(file):
        return remote.open_remote(file, where, LARGEST_FILE, header)
    try:
        # Reading a pipe or a device could block forever.
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise InputError(f"{where}: {file} is not a file, and therefore not a readable image")
        return open(file, "rb")
    except OSError as error:
        raise InputError(f"{where}: {file} cannot be read ({error.strerror or error})") from error


def read_file(file: str, where: str, most: int = LARGEST_FILE) -> bytes:
    """Return all bytes of a file.

    Raises:
        InputError: As `open_file`, or the file has more than `most` bytes.
    """
    with open_file(file, where) as stream:
        # One byte more than allowed shows that the file is larger.
        content = _read(stream, most + 1, file, where)
    if len(content) > most:
        raise InputError(
            f"{where}: {remote.redacted(file)} has more than {most} bytes, too many for one "
            "plane; crop or tile it"
        )
    return content


def read_start(file: str, where: str, size: int) -> bytes:
    """Return the first `size` bytes of a file, which contain its header.

    Raises:
        InputError: As `open_file`.
    """
    with open_file(file, where, header=True) as stream:
        return _read(stream, size, file, where)


def names_of_folder(folder: str) -> list[str]:
    """Return the names in a folder; an empty list if it is missing or cannot be listed.

    Raises:
        InputError: No permission to list a bucket, or all attempts failed.
    """
    if remote.is_remote(folder):
        return remote.names_of_prefix(folder, "--images")
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _read(stream: BufferedIOBase, size: int, file: str, where: str) -> bytes:
    try:
        return stream.read(size)
    except OSError as error:
        raise InputError(f"{where}: {file} cannot be read ({error.strerror or error})") from error
