"""Finding the file that a row of a table names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from data_prep.sources import remote
from data_prep.sources.files import names_of_folder
from perturbjax.core.errors import InputError


class FileFinder:
    """Finds the file a row names, below the images folder or where the row says.

    A path written on another machine is matched by its last folders: the longest run of them that exists below
    the images folder. Folders are listed once, since a plate has tens of thousands of files in a few of them. Behind
    HTTPS, which lists nothing, the first file of each folder is asked for, and the others are taken to lie beside it.
    """

    def __init__(self, images: str, must_exist: bool = True):
        self.remote = remote.is_remote(images)
        if not self.remote and not Path(images).is_dir():
            raise InputError(f"--images {images}: no such folder")
        self.images = images.rstrip("/") if self.remote else str(Path(images).resolve())
        self.must_exist = must_exist
        self._listings: dict[str, frozenset[str]] = {}
        self._candidates: dict[str, list[str]] = {}

    def find(self, folder: str, name: str, where: str) -> str:
        """Absolute path or URL of a file; "" where it is absent and need not exist.

        Raises:
            InputError: the row names no file, or the file is not there.
        """
        if not name:
            raise InputError(f"{where}: names no file")
        if folder not in self._candidates:
            self._candidates[folder] = list(dict.fromkeys(self._folders(folder)))
        for candidate in self._candidates[folder]:
            if self._holds(candidate, folder, name, where):
                return f"{candidate}/{name}"
        if not self.must_exist:
            return ""
        raise InputError(
            f"{where}: {name} is neither in {folder or '(no path)'} nor below --images {self.images}"
        )

    def _folders(self, folder: str) -> Iterator[str]:
        written = PurePosixPath(folder.replace("\\", "/"))
        if written.is_absolute() and not self.remote:
            yield str(written)
        parts = [part for part in written.parts if part != "/"]
        for start in range(len(parts) + 1):
            yield "/".join([self.images, *parts[start:]])

    def _holds(self, candidate: str, folder: str, name: str, where: str) -> bool:
        if self.images.startswith("http"):
            if len(self._candidates[folder]) > 1 and remote.is_there(f"{candidate}/{name}", where):
                self._candidates[folder] = [candidate]
            return self._candidates[folder] == [candidate]
        if candidate not in self._listings:
            self._listings[candidate] = frozenset(names_of_folder(candidate))
        return name in self._listings[candidate]
