"""What is written appears whole, under the name that was asked for, and takes the place of files alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic, require_free_space, write_json


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert (tmp_path / "a.json").read_text() == "old"
    write_json(tmp_path / "a.json", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (
        tmp_path / "a.json"
    ).read_text() == "3\n"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.json").symlink_to(tmp_path / "disk" / "b.json")
    for value in (1, 2):  # the first makes what the link points to
        write_json(tmp_path / "a.json", value)
        assert (tmp_path / "a.json").is_symlink() and (
            tmp_path / "disk" / "b.json"
        ).read_text() == f"{value}\n"


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a pipe"])
def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    before = stat.S_IFMT(os.lstat(path).st_mode)
    with pytest.raises(InputError, match=r"a\.json: is there and is not a regular file"):
        write_json(path, 1)
    assert stat.S_IFMT(os.lstat(path).st_mode) == before


def test_room_is_asked_for_and_given_back(tmp_path: Path) -> None:
    require_free_space(tmp_path, 1 << 20)
    with pytest.raises(OSError, match=r"No space|too large"):
        require_free_space(tmp_path, 1 << 60)
    assert not list(tmp_path.iterdir())
