"""A table is what was written, whole, or one line that names its row."""

from __future__ import annotations

import gzip
import os

import pytest

from data_prep.csv_tables import read_table
from perturbjax.core.errors import InputError
from perturbjax.core.files import OPENERS


def test_cells_are_text_as_written(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbf a ,b\r\n007,"x, ""y"""\r\n\r\nNA,\r\n')
    table = read_table(path)
    assert list(table.columns) == ["a", "b"]
    assert table.to_numpy().tolist() == [["007", 'x, "y"'], ["NA", ""]]


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
def test_packed_tables_are_read(tmp_path, suffix):
    path = tmp_path / f"t.csv{suffix}"
    with OPENERS.get(suffix, open)(path, "wb") as file:
        file.write(b"a,b\n1,2\n")
    assert read_table(path).to_numpy().tolist() == [["1", "2"]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a,b\n1,2\n3\n", "row 3: has 1 cells and the header 2 columns"),
        (b"a,b\n1,2,3\n", "row 2: has 3 cells"),
        (b"a,b\n1,2\nx,\0\n", "line 3: holds a NUL byte"),
        (b"a,b,a\n1,2,3\n", "column a stands twice"),
        (b"a,,\n1,2,3\n", "column .without a name. stands twice"),
        (b'a,b\n1,"2\n', "cannot be read as a table"),
        (b"a,b\n1,\xff\xfe\n", "cannot be read as a table"),
        (b"a,b\n", "a header but no rows"),
        (b"\n\n", "is empty"),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path, content, words):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize("kept", [5, 40, -6])
def test_a_packed_table_that_was_cut_short_is_one_line(tmp_path, kept):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(
        gzip.compress(b"a,b\n" + b"".join(b"%d,%d\n" % (n, n * n) for n in range(500)))[:kept]
    )
    with pytest.raises(InputError, match=r"cannot be read as a table .*is it whole"):
        read_table(path)


def test_a_packed_table_that_never_ends_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.csv_tables.LARGEST_TABLE", 10_000)
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(bytes(20_000)))
    with pytest.raises(InputError, match="no table of a screen"):
        read_table(path)


def test_a_folder_or_a_pipe_is_no_table(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path, tmp_path / "pipe.csv"):
        with pytest.raises(InputError, match="is not a file"):
            read_table(path)
