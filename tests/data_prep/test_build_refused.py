"""Bad tables, images, flags and places end in one line, and nothing is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from data_prep_builds import options

from data_prep.build import build


def replace(table: pd.DataFrame, row: int, column: str, value: str) -> pd.DataFrame:
    table.loc[row, column] = value
    return table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.drop(columns="Metadata_Well"),
            "load_data.csv: column Metadata_Well is missing",
        ),
        (lambda t: t.iloc[:0], "load_data.csv: has a header but no rows"),
        (
            lambda t: t[[c for c in t if c.startswith("Metadata")]],
            "has no FileName_Orig<CHANNEL> column",
        ),
        (
            lambda t: replace(t, 2, "FileName_OrigDNA", "gone.tiff"),
            "row 4, channel DNA: gone.tiff is neither in",
        ),
        (lambda t: replace(t, 2, "FileName_OrigDNA", ""), "row 4, channel DNA: names no file"),
        (lambda t: replace(t, 2, "Metadata_Plate", ""), "row 4: Metadata_Plate is empty"),
        (lambda t: pd.concat([t, t.iloc[[3]]]), "rows 5 and 26: both are plate SIM001"),
        (
            lambda t: t[[c for c in t if "pert" not in c and "moa" not in c and "broad" not in c]],
            "--label-column",
        ),
    ],
)
def test_a_bad_table_is_one_line_and_nothing_is_written(
    edit, refused, build_arguments, tmp_path, change, message
):
    edit(change)
    assert message in refused(*build_arguments("--segment-channels", "DNA"))
    assert [path.name for path in tmp_path.iterdir()] == ["plate"]


def test_a_missing_and_an_empty_csv(plate, refused, build_arguments, tmp_path):
    (plate / "load_data.csv").write_text("")
    assert "load_data.csv: is empty" in refused(*build_arguments())
    (plate / "load_data.csv").unlink()
    assert "load_data.csv: no such file" in refused(*build_arguments())
    assert [path.name for path in tmp_path.iterdir()] == ["plate"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--channels", "DNA,Mito"], "--channels Mito: .*it has DNA, Actin, Tubulin"),
        (["--segment-channels", "Mito"], "Mito: .*it has DNA, Actin, Tubulin"),
        (
            ["--label-column", "Metadata_gene"],
            "--label-column Metadata_gene: .*it has Metadata_Plate",
        ),
        (["--aggregate", "none"], "--segment-channels"),
        (["--weights", "nuclei"], "the watershed has no weights"),
        (
            ["--segmenter", "cellpose", "--weights", "cyto3"],
            "--segment-channels; there are DNA, Actin, Tubulin",
        ),
        (["--segmenter", "cellpose", "--segment-channels", "DNA"], "needs --weights"),
        (
            ["--segmenter", "cellpose", "--segment-channels", "DNA", "--weights", "cyto9"],
            "--weights cyto9: no such file.*nuclei, cyto, cyto2, cyto3",
        ),
        (["--diameter", "-4"], "--diameter -4"),
        (["--resize", "-4"], "--resize -4"),
        (["--workers", "-4"], "--workers -4"),
    ],
)
def test_a_bad_flag_is_one_line_and_nothing_is_written(
    refused, build_arguments, tmp_path, flags, message
):
    import re

    assert re.search(message, refused(*build_arguments(*flags)))
    assert [path.name for path in tmp_path.iterdir()] == ["plate"]


@pytest.mark.parametrize("kind", ["text", "truncated", "shape"])
def test_a_bad_image_is_told_of_before_anything_is_segmented(
    plate, refused, build_arguments, tmp_path, kind
):
    path = plate / "images/SIM002/SIM002_A01_s02_Actin.tiff"
    if kind == "text":
        path.write_text("no image")
    elif kind == "truncated":
        os.truncate(path, 4000)
    else:
        tifffile.imwrite(path, np.zeros((64, 60), np.uint16))
    line = refused(*build_arguments())
    assert "load_data.csv, row 15: " in line and path.name in line
    assert [path.name for path in tmp_path.iterdir()] == ["plate"]


def test_an_image_that_claims_far_more_pixels_than_the_others_is_refused(
    plate, refused, build_arguments, tmp_path
):
    for channel in ("DNA", "Actin", "Tubulin"):
        path = plate / f"images/SIM002/SIM002_A01_s02_{channel}.tiff"
        tifffile.imwrite(
            path, np.zeros((64, 64), np.uint16), compression="zlib", metadata=None, rowsperstrip=64
        )
        with tifffile.TiffFile(path, mode="r+") as tiff:
            for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
                tiff.pages[0].tags[tag].overwrite(6000)
    assert "row 15: the images have 6000 x 6000 pixels" in refused(*build_arguments())
    assert [path.name for path in tmp_path.iterdir()] == ["plate"]


def test_an_output_that_cannot_be_written(refused, build_arguments, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be created" in refused(*build_arguments(out=tmp_path / "file" / "dataset"))
    assert "/proc" in refused(*build_arguments(out=Path("/proc/nowhere/dataset")))


def test_a_folder_that_is_no_dataset_is_left_alone_even_with_overwrite(
    refused, build_arguments, tmp_path
):
    precious = tmp_path / "dataset" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    assert "exists and is not a dataset" in refused(*build_arguments("--overwrite"))
    assert precious.read_text() == "years of work"


def test_overwrite_deletes_no_file_of_the_users(plate, refused, build_arguments, tmp_path):
    build(options(plate, tmp_path / "dataset"))
    (tmp_path / "dataset" / "thesis.txt").write_text("years of work")
    assert "contains thesis.txt, which is not part of a dataset" in refused(
        *build_arguments("--overwrite")
    )
    assert (tmp_path / "dataset" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("out", ["", ".", "/", ".."])
@pytest.mark.parametrize("verb", ["build", "simulate"])
def test_an_output_without_a_name_is_one_line(refused, build_arguments, verb, out):
    arguments = build_arguments() if verb == "build" else ["simulate", "--out", "x"]
    arguments[arguments.index("--out") + 1] = out
    assert "must be the name of what to make" in refused(*arguments)


def test_a_date_that_is_none_is_one_line(refused, build_arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "x")
    assert "SOURCE_DATE_EPOCH=x: must be whole seconds" in refused(*build_arguments())
    assert [path.name for path in tmp_path.iterdir()] == ["plate"]


def limited(command: list[object], bytes: int, **environment: str) -> subprocess.CompletedProcess:
    """Run `python -m data_prep …` where no file can grow beyond some bytes, as on a disk that fills up."""
    code = f"""
import resource, signal, runpy, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, {bytes}))
sys.argv = ["data_prep", *{[str(word) for word in command]!r}]
if __name__ == "__main__":
    runpy.run_module("data_prep", run_name="__main__")
"""
    words = [sys.executable, "-c", code]
    return subprocess.run(
        words, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def test_a_disk_that_fills_up_while_shards_are_written_is_one_line(simulated, tmp_path):
    flags = [
        "build",
        "--load-data",
        simulated / "load_data.csv",
        "--images",
        simulated,
        "--workers",
        1,
    ]
    flags += ["--segment-channels", "DNA", "--segmenter", "watershed", "--aggregate", "none"]
    flags += ["--out", tmp_path / "dataset"]
    done = limited(flags, 300_000)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    assert not (tmp_path / "dataset").exists()
    assert subprocess.run([sys.executable, "-m", "data_prep", *map(str, flags)]).returncode == 0


def test_a_disk_that_fills_up_while_a_plate_is_drawn_is_one_line(tmp_path):
    done = limited(
        ["simulate", "--out", tmp_path / "plate", "--wells", 4, "--compounds", 2], 20_000
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    assert not (tmp_path / "plate").exists()
