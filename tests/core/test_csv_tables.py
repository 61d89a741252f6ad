"""Tables are read completely, or one line names the wrong row."""

from __future__ import annotations

import gzip
import os

import pandas as pd
import pytest

from perturbjax.core.csv_tables import read_table
from perturbjax.core.errors import InputError
from perturbjax.core.files import OPENERS


def test_cells_are_text(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbf a ,b\r\n007,"x, ""y"""\r\n\r\nNA,\r\n')
    table = read_table(path)
    assert list(table.columns) == ["a", "b"]
    assert table.to_numpy().tolist() == [["007", 'x, "y"'], ["", ""]]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separator_is_detected_and_reported(tmp_path, capsys, separator):
    (tmp_path / "t.csv").write_text(
        f"a{separator}b\n0012{separator}x, y\n".replace("x, y", '"x, y"')
    )
    assert read_table(tmp_path / "t.csv").to_numpy().tolist() == [["0012", "x, y"]]
    name = {";": "semicolons", "\t": "tabs"}.get(separator)
    messages = capsys.readouterr().err
    assert f"separated by {name}" in messages if name else not messages


def test_decimal_commas_become_points(tmp_path):
    (tmp_path / "t.csv").write_text("name;dose\na,b;1,5\nc;2\n")
    assert read_table(tmp_path / "t.csv").to_numpy().tolist() == [["a,b", "1.5"], ["c", "2"]]


def test_spaces_are_removed_and_reported(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("label,b\na ,1\na,2\n")
    assert list(read_table(tmp_path / "t.csv")["label"]) == ["a", "a"]
    assert "removed spaces at the ends of 1 cells of label" in capsys.readouterr().err


VALUES = ("01", "1", "1.0", "NA", "None", "null", "nan", "N/A", "1e5", "TRUE", "inf", "007")


@pytest.mark.parametrize("value", VALUES)
def test_csv_and_parquet_give_the_same_cells(tmp_path, value):
    table = pd.DataFrame({"label": [value, "x"], "b": ["1", "2"]})
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    csv, parquet = read_table(tmp_path / "t.csv"), read_table(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(csv, parquet)
    assert csv["label"][0] == (
        "" if value.lower() in ("na", "none", "null", "nan", "n/a") else value
    )


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("cp1252", r"line 2: is not UTF-8 text .byte 0xb5.*save .*UTF-8"),
        ("utf-16", "encoded as UTF-16"),
    ],
)
def test_other_encodings_are_named(tmp_path, encoding, words):
    (tmp_path / "t.csv").write_text("dose,b\n10 \u00b5M,1\n", encoding=encoding)
    with pytest.raises(InputError, match=words):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
def test_compressed_tables_are_read(tmp_path, suffix):
    path = tmp_path / f"t.csv{suffix}"
    with OPENERS.get(suffix, open)(path, "wb") as file:
        file.write(b"a,b\n1,2\n")
    assert read_table(path).to_numpy().tolist() == [["1", "2"]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a,b\n1,2\n3\n", "row 3: has 1 cells, but the header has 2 columns"),
        (b"a,b\n1,2,3\n", "row 2: has 3 cells"),
        (b"a,b\n1,2\nx,\0\n", "line 3: contains a NUL byte"),
        (b"a,b,a\n1,2,3\n", "column a occurs twice"),
        (b"a,,\n1,2,3\n", "column .without a name. occurs twice"),
        (b'a,b\n1,"2\n', "cannot be read as a table"),
        (b"a,b\n1,\xff\xfe\n", "is not UTF-8 text"),
        (b"a,b\n", "a header but no rows"),
        (b"\n\n", "is empty"),
    ],
)
def test_damaged_table_is_one_line(tmp_path, content, words):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize("end", [5, 40, -6])
def test_truncated_compressed_table_is_one_line(tmp_path, end):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(
        gzip.compress(b"a,b\n" + b"".join(b"%d,%d\n" % (n, n * n) for n in range(500)))[:end]
    )
    with pytest.raises(InputError, match=r"cannot be read as a table .*may be truncated"):
        read_table(path)


def test_huge_compressed_table_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("perturbjax.core.csv_tables.LARGEST_TABLE", 10_000)
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(bytes(20_000)))
    with pytest.raises(InputError, match="not a table of sites"):
        read_table(path)


def test_very_wide_table_is_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(",".join(map(str, range(500_000))) + "\n" + "," * 499_999)
    with pytest.raises(InputError, match="has 500,000 columns; a table of sites has at most"):
        read_table(path)


def test_folder_or_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path, tmp_path / "pipe.csv"):
        with pytest.raises(InputError, match="is not a file"):
            read_table(path)
