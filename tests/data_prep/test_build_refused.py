"""Invalid input of `build` and `simulate` ends with one line of error and no output."""

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


def set_cell(table: pd.DataFrame, row: int, column: str, value: str) -> pd.DataFrame:
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
            lambda t: set_cell(t, 2, "FileName_OrigDNA", "gone.tiff"),
            "row 4, channel DNA: gone.tiff is neither in",
        ),
        (lambda t: set_cell(t, 2, "FileName_OrigDNA", ""), "row 4, channel DNA: names no file"),
        (lambda t: set_cell(t, 2, "Metadata_Plate", ""), "row 4: Metadata_Plate is empty"),
        (lambda t: pd.concat([t, t.iloc[[3]]]), "rows 5 and 26: both are plate SIM001"),
        (
            lambda t: t[[c for c in t if "pert" not in c and "moa" not in c and "broad" not in c]],
            "--label-column",
        ),
    ],
)
def test_build_refuses_an_invalid_table_and_writes_nothing(
    edit, refused, build_arguments, tmp_path, change, message
):
    edit(change)
    assert message in refused(*build_arguments("--segment-channels", "DNA"))
    assert [path.name for path in tmp_path.iterdir()] == ["plate"]


def test_build_refuses_a_missing_or_empty_table(plate, refused, build_arguments, tmp_path):
    (plate / "load_data.csv").write_text("")
    assert "load_data.csv: is empty" in refused(*build_arguments())
    (plate / "load_data.csv").unlink()
    assert "load_data.csv: no such file" in refused(*build_arguments())
    assert [path.name for path in tmp_path.iterdir()] == ["plate"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--channels", "DNA,Mito"], "--channels Mito: .*available: DNA, Actin, Tubulin"),
        (["--segment-channels", "Mito"], "Mito: .*available: DNA, Actin, Tubulin"),
        (
            ["--label-column", "Metadata_gene"],
            "--label-column Metadata_gene: .*available: Metadata_Plate",
        ),
        (["--aggregate", "none"], "--segment-channels"),
        (["--weights", "nuclei"], "the watershed has no weights"),
        (
            ["--segmenter", "cellpose", "--weights", "cyto3"],
            r"--segment-channels \(available: DNA, Actin, Tubulin\)",
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
def test_build_refuses_invalid_flags_and_writes_nothing(
    refused, build_arguments, tmp_path, flags, message
):
    import re

    assert re.search(message, refused(*build_arguments(*flags)))
    assert [path.name for path in tmp_path.iterdir()] == ["plate"]


@pytest.mark.parametrize("kind", ["text", "truncated", "shape"])
def test_build_refuses_an_invalid_image_before_segmentation(
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


def test_build_refuses_a_header_with_far_more_pixels(plate, refused, build_arguments, tmp_path):
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


def test_build_refuses_an_output_that_cannot_be_written(refused, build_arguments, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be created" in refused(*build_arguments(out=tmp_path / "file" / "dataset"))
    assert "/proc" in refused(*build_arguments(out=Path("/proc/nowhere/dataset")))


def test_overwrite_never_replaces_a_folder_without_dataset(refused, build_arguments, tmp_path):
    notes = tmp_path / "dataset" / "thesis.txt"
    notes.parent.mkdir()
    notes.write_text("years of work")
    assert "exists and is not a dataset" in refused(*build_arguments("--overwrite"))
    assert notes.read_text() == "years of work"


def test_overwrite_never_deletes_other_files(plate, refused, build_arguments, tmp_path):
    build(options(plate, tmp_path / "dataset"))
    (tmp_path / "dataset" / "thesis.txt").write_text("years of work")
    assert "contains thesis.txt, which is not part of a dataset" in refused(
        *build_arguments("--overwrite")
    )
    assert (tmp_path / "dataset" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("out", ["", ".", "/", ".."])
@pytest.mark.parametrize("name", ["build", "simulate"])
def test_output_must_have_a_name(refused, build_arguments, name, out):
    arguments = build_arguments() if name == "build" else ["simulate", "--out", "x"]
    arguments[arguments.index("--out") + 1] = out
    assert "must be the name of a new file or folder" in refused(*arguments)


def test_build_refuses_an_invalid_source_date_epoch(
    refused, build_arguments, tmp_path, monkeypatch
):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "x")
    assert "SOURCE_DATE_EPOCH=x: must be whole seconds" in refused(*build_arguments())
    assert [path.name for path in tmp_path.iterdir()] == ["plate"]


def run_with_file_limit(
    arguments: list[object], bytes: int, **environment: str
) -> subprocess.CompletedProcess:
    """Run `python -m data_prep` with a maximum file size in bytes, like a full disk."""
    code = f"""
import resource, signal, runpy, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, {bytes}))
sys.argv = ["data_prep", *{[str(word) for word in arguments]!r}]
if __name__ == "__main__":
    runpy.run_module("data_prep", run_name="__main__")
"""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def test_build_reports_a_full_disk_in_one_line(simulated, tmp_path):
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
    result = run_with_file_limit(flags, 300_000)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("error: ") == 1
    assert not (tmp_path / "dataset").exists()
    assert subprocess.run([sys.executable, "-m", "data_prep", *map(str, flags)]).returncode == 0


def test_simulate_reports_a_full_disk_in_one_line(tmp_path):
    result = run_with_file_limit(
        ["simulate", "--out", tmp_path / "plate", "--wells", 4, "--compounds", 2], 20_000
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("error: ") == 1
    assert not (tmp_path / "plate").exists()
