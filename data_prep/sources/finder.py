"""Finding the file that a row of a table names."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from perturbjax.console import InputError


class FileFinder:
    """Finds the file a row names, below the images folder or where the row says.

    A path written on another machine is matched by its last folders: the longest run of them that exists below
    the images folder. Folders are listed once, since a plate has tens of thousands of files in a few of them.
    """

    def __init__(self, images: Path, must_exist: bool = True):
        if not images.is_dir():
            raise InputError(f"--images {images}: no such folder")
        self.images = images.resolve()
        self.must_exist = must_exist
        self._listings: dict[Path, frozenset[str]] = {}
        self._candidates: dict[str, list[Path]] = {}

    def find(self, folder: str, name: str, where: str) -> str:
        """Absolute path of a file; "" where it is absent and need not exist.

        Raises:
            InputError: the row names no file, or the file is not there.
        """
        if not name:
            raise InputError(f"{where}: names no file")
        if folder not in self._candidates:
            self._candidates[folder] = list(dict.fromkeys(self._folders(folder)))
        for candidate in self._candidates[folder]:
            if name in self._names(candidate):
                return str(candidate / name)
        if not self.must_exist:
            return ""
        raise InputError(f"{where}: {name} is neither in {folder or '(no path)'} nor below --images {self.images}")

    def _folders(self, folder: str):
        written = PurePosixPath(folder.replace("\\", "/"))
        if written.is_absolute():
            yield Path(written)
        parts = [part for part in written.parts if part != "/"]
        for start in range(len(parts) + 1):
            yield self.images.joinpath(*parts[start:])

    def _names(self, folder: Path) -> frozenset[str]:
        if folder not in self._listings:
            try:
                self._listings[folder] = frozenset(entry.name for entry in folder.iterdir())
            except OSError:
                self._listings[folder] = frozenset()
        return self._listings[folder]
