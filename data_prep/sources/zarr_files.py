"""Files of a Zarr store, on this machine or behind a URL, as a store of zarr-python.

Every file is read with a limit. Local files must be regular files: reading a pipe or a device
could block, or never end.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest

from data_prep.sources import remote
from data_prep.sources.files import LARGEST_FILE
from perturbjax.core.errors import InputError

#: Names of metadata files, and their maximum size in bytes. The consolidated metadata of a plate
#: have about 20 MB.
_METADATA = (".zarray", ".zgroup", ".zattrs", ".zmetadata", "zarr.json")
LARGEST_METADATA = 1 << 25


class GuardedStore(Store):
    """Read-only store with limits.

    Args:
        root: Folder or URL.
        where: Table and row, for messages.
    """

    supports_writes = supports_deletes = supports_listing = False

    def __init__(self, root: str, where: str):
        super().__init__(read_only=True)
        self.root, self.where = root, where

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return the bytes of a file, or None if it does not exist.

        Raises:
            InputError: It is not a regular file, is too large, or cannot be read.
        """
        most = LARGEST_METADATA if key.rpartition("/")[2] in _METADATA else LARGEST_FILE
        bounds = _bounds(byte_range)
        if remote.is_remote(self.root):
            content = await remote.read_async(f"{self.root}/{key}", self.where, most, bounds)
        else:
            path = Path(self.root, key)
            content = await asyncio.to_thread(_read_local, path, self.where, most, bounds)
        return None if content is None else prototype.buffer.from_bytes(content)

    async def get_partial_values(
        self, prototype: Any, key_ranges: Iterable[tuple[str, Any]]
    ) -> Any:
        return [await self.get(key, prototype, part) for key, part in key_ranges]

    async def exists(self, key: str) -> bool:
        if remote.is_remote(self.root):
            return await remote.exists_async(f"{self.root}/{key}", self.where)
        return Path(self.root, key).is_file()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GuardedStore) and other.root == self.root

    async def set(self, key: str, value: Any) -> None:
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        raise NotImplementedError

    def list(self) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError


def open_store(root: str, where: str) -> GuardedStore:
    """Open a Zarr store at a folder or URL.

    Raises:
        InputError: The folder does not exist.
    """
    if not remote.is_remote(root) and not os.path.isdir(root):
        raise InputError(f"{where}: {root} is not a folder")
    return GuardedStore(root, where)


def _bounds(request: Any) -> tuple[int, int | None] | None:
    """Return (start, end) of a requested range; a negative start counts from the end."""
    if isinstance(request, RangeByteRequest):
        return request.start, request.end
    if isinstance(request, OffsetByteRequest):
        return request.offset, None
    if isinstance(request, SuffixByteRequest):
        return -request.suffix, None
    return None


def _read_local(
    path: Path, where: str, most: int, bounds: tuple[int, int | None] | None
) -> bytes | None:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            return None
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{where}: {path} is not a regular file; it was not read")
        start, end = bounds or (0, None)
        start = max(status.st_size + start, 0) if start < 0 else start
        size = min(status.st_size if end is None else end, status.st_size) - start
        if size > most:
            raise InputError(f"{where}: {path} has {size} bytes, but {most} are allowed")
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(max(size, 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise InputError(f"{where}: {path} cannot be read ({error})") from error
