"""Files are written completely or not at all, and replace regular files only."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from perturbjax.core.errors import InputError
from perturbjax.core.files import (
    atomic,
    describe_path,
    require_folder,
    require_free_space,
    write_json,
)


def test_atomic_replaces_the_file_on_success_only(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert (tmp_path / "a.json").read_text() == "old"
    write_json(tmp_path / "a.json", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (
        tmp_path / "a.json"
    ).read_text() == "3\n"


def test_atomic_writes_through_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.json").symlink_to(tmp_path / "disk" / "b.json")
    for value in (1, 2):  # the first write creates the target of the link
        write_json(tmp_path / "a.json", value)
        assert (tmp_path / "a.json").is_symlink() and (
            tmp_path / "disk" / "b.json"
        ).read_text() == f"{value}\n"


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a pipe"])
def test_atomic_refuses_other_than_regular_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    before = stat.S_IFMT(os.lstat(path).st_mode)
    with pytest.raises(InputError, match=r"a\.json: exists and is not a regular file"):
        write_json(path, 1)
    assert stat.S_IFMT(os.lstat(path).st_mode) == before


def test_require_free_space_allocates_and_frees(tmp_path: Path) -> None:
    require_free_space(tmp_path, 1 << 20)
    with pytest.raises(OSError, match=r"No space|too large"):
        require_free_space(tmp_path, 1 << 60)
    assert not list(tmp_path.iterdir())


def test_describe_path_names_the_kind_of_an_input(tmp_path):
    assert describe_path(tmp_path / "none") == "does not exist"
    assert describe_path(tmp_path) == "is an empty folder"
    (tmp_path / "a.csv").touch()
    assert describe_path(tmp_path / "a.csv") == "is a csv file"
    assert describe_path(tmp_path) == "is a folder that contains a.csv"
    (tmp_path / "provenance.json").touch()
    assert describe_path(tmp_path) == "is a dataset directory (option --data)"


def test_require_folder_names_files_and_missing_folders(tmp_path):
    require_folder("images", tmp_path)
    (tmp_path / "a.csv").touch()
    with pytest.raises(InputError, match=r"--images .*a\.csv: is a csv file, not a folder"):
        require_folder("images", tmp_path / "a.csv")
    with pytest.raises(InputError, match=r"--images .*none: no such folder"):
        require_folder("images", tmp_path / "none")
