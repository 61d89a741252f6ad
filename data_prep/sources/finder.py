"""Find the file that a row of a table names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from data_prep.sources import remote
from data_prep.sources.files import names_of_folder
from perturbjax.core.errors import InputError
from perturbjax.core.files import require_folder


class FileFinder:
    """Find image files below the images folder, or at the absolute path of a row.

    A path of another machine is matched by its last folders: the longest sequence of them that
    exists below the images folder. Each folder is listed once, because a plate has tens of
    thousands of files in few folders. HTTPS servers do not list folders: only the first file of
    each folder is checked, and the remaining files are assumed to exist.

    Args:
        images: Folder or URL of the images.
        must_exist: Refuse missing files.

    Raises:
        InputError: The folder does not exist.
    """

    def __init__(self, images: str, must_exist: bool = True):
        self.remote = remote.is_remote(images)
        if not self.remote:
            require_folder("images", Path(images))
        self.images = images.rstrip("/") if self.remote else str(Path(images).resolve())
        self.must_exist = must_exist
        self._listings: dict[str, frozenset[str]] = {}
        self._candidates: dict[str, list[str]] = {}

    def find(self, folder: str, name: str, where: str) -> str:
        """Return the absolute path or URL of a file; "" if it is missing and need not exist.

        Args:
            folder: Folder as written in the table.
            name: File name without folder.
            where: Table, row and channel, for messages.

        Raises:
            InputError: The row names no file, or the file does not exist.
        """
        if not name:
            raise InputError(f"{where}: names no file")
        if folder not in self._candidates:
            self._candidates[folder] = list(dict.fromkeys(self._folders(folder)))
        for candidate in self._candidates[folder]:
            if self._has_file(candidate, folder, name, where):
                return f"{candidate}/{name}"
        if not self.must_exist:
            return ""
        raise InputError(
            f"{where}: {name} is neither in {folder or '(no path)'} nor below --images "
            f"{remote.redacted(self.images)}"
        )

    def _folders(self, folder: str) -> Iterator[str]:
        """Yield folders in which a file may be, the most specific first."""
        # Paths of Windows machines have backslashes.
        written = PurePosixPath(folder.replace("\\", "/"))
        if written.is_absolute() and not self.remote:
            yield str(written)
        parts = [part for part in written.parts if part != "/"]
        # All parts first, then without the first, and so on, down to the images folder.
        for start in range(len(parts) + 1):
            yield "/".join([self.images, *parts[start:]])

    def _has_file(self, candidate: str, folder: str, name: str, where: str) -> bool:
        if self.images.startswith("http"):
            # HTTPS: the first existing file fixes the folder for all later files of it.
            if len(self._candidates[folder]) > 1 and remote.exists(f"{candidate}/{name}", where):
                self._candidates[folder] = [candidate]
            return self._candidates[folder] == [candidate]
        # One listing per folder is much faster than a test of each file on network disks.
        if candidate not in self._listings:
            self._listings[candidate] = frozenset(names_of_folder(candidate))
        return name in self._listings[candidate]
