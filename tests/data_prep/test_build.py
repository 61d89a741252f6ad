from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from data_prep.build import BuildConfig, build
from data_prep.images import aggregate_channels, resize_mask
from data_prep.masks import MaskStore, trim
from perturbjax.console import InputError
from perturbjax.dataset import open_dataset


@pytest.fixture(scope="module")
def dataset(simulated: Path, tmp_path_factory) -> Path:
    """The plate with its three channels apart, nuclei segmented."""
    out = tmp_path_factory.mktemp("built") / "dataset"
    build(options(simulated, out))
    return out


def options(plate: Path, out: Path, **changes) -> BuildConfig:
    settings = {"aggregate": "none", "segment_channels": "DNA", "workers": 1, **changes}
    return BuildConfig(load_data=plate / "load_data.csv", images=plate, out=out, **settings)


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_records_hold_the_pixels_of_the_files_in_the_order_of_the_table(simulated, dataset):
    opened = open_dataset(dataset)
    assert opened.channel_names == ["DNA", "Actin", "Tubulin"] and opened.image_dtype == np.uint16
    table = pd.read_csv(simulated / "load_data.csv", dtype=str)
    assert list(opened.column("Metadata_Well")) == list(table["Metadata_Well"])
    images, masks = opened.read([5, 0])
    for image, row in zip(images, (5, 0), strict=True):
        for channel, name in enumerate(opened.channel_names):
            path = simulated / table[f"PathName_Orig{name}"][row] / table[f"FileName_Orig{name}"][row]
            np.testing.assert_array_equal(image[..., channel], tifffile.imread(path))
    assert masks.dtype == np.uint16 and (masks.max((1, 2)) > 0).all()


def test_the_index_says_what_the_records_hold(dataset):
    opened = open_dataset(dataset)
    assert len(opened) == 24 and opened.index["site_id"].is_unique
    classes = sorted(opened.column("Metadata_pert_iname").unique())
    for position in (0, 7, 23):
        record, row = opened.record(position), opened.index.iloc[position]
        assert record["site_id"].decode() == row["site_id"]
        assert record["label"] == row["label"] == classes.index(row["Metadata_pert_iname"])
        assert record["Metadata_Well"].decode() == row["Metadata_Well"]
        assert row["n_cells"] == len(np.unique(record["mask"])) - 1
        assert row["mask_area"] == (record["mask"] > 0).sum()
        actin = record["image"][..., 1]
        expected = [actin.mean(), actin.std(), *np.percentile(actin, (1, 50, 99))]
        found = row[["mean_Actin", "std_Actin", "p01_Actin", "p50_Actin", "p99_Actin"]].astype(float)
        np.testing.assert_allclose(found, expected)


def test_provenance_says_how_it_was_made(dataset, simulated):
    provenance = json.loads((dataset / "provenance.json").read_text())
    assert provenance["channels_stored"] == ["DNA", "Actin", "Tubulin"]
    assert provenance["label_column"] == "Metadata_pert_iname"
    assert (provenance["n_sites"], provenance["n_classes"]) == (24, 3)
    assert provenance["segmenter"]["engine"] == "nuclei"  # one channel is segmented
    assert provenance["segmenter"]["channels"] == ["DNA"]
    csv = (simulated / "load_data.csv").read_bytes()
    assert provenance["source"]["sha256"] == {"load_data": hashlib.sha256(csv).hexdigest()}
    for name, file in provenance["files"].items():
        assert file["sha256"] == contents(dataset)[name]
    row = pd.read_csv(simulated / "load_data.csv", dtype=str).iloc[4]
    paths = [simulated / row[f"PathName_Orig{c}"] / row[f"FileName_Orig{c}"] for c in ("DNA", "Actin", "Tubulin")]
    digests = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)
    assert open_dataset(dataset).column("source_sha256")[4] == hashlib.sha256(digests).hexdigest()
    assert str(simulated) not in json.dumps(provenance)


def test_the_aggregated_image_is_resized_with_its_mask(simulated, tmp_path):
    build(options(simulated, tmp_path / "dataset", aggregate="median", segment_channels="", resize=32, workers=2))
    opened = open_dataset(tmp_path / "dataset")
    assert opened.channel_names == ["aggregate"] and opened.image_size == (32, 32)
    images, masks = opened.read([0])
    table = pd.read_csv(simulated / "load_data.csv")
    paths = [simulated / "images/SIM001" / table[f"FileName_Orig{c}"][0] for c in ("DNA", "Actin", "Tubulin")]
    whole = aggregate_channels(np.stack([tifffile.imread(path) for path in paths], -1), "median")[..., 0]
    blocks = whole.reshape(32, 2, 32, 2).mean((1, 3))
    np.testing.assert_allclose(images[0, ..., 0], blocks, atol=1)
    assert masks.shape == (1, 32, 32) and masks.max() > 0


def test_building_again_changes_nothing_and_other_settings_need_overwrite(simulated, dataset, capsys):
    before = contents(dataset)
    build(options(simulated, dataset))
    assert "is already built" in capsys.readouterr().err
    with pytest.raises(InputError, match="holds a dataset of other settings"):
        build(options(simulated, dataset, label_column="Metadata_moa"))
    assert contents(dataset) == before
    assert list(dataset.parent.iterdir()) == [dataset]


def test_overwrite_replaces_the_dataset(simulated, tmp_path):
    out = tmp_path / "dataset"
    build(options(simulated, out))
    build(options(simulated, out, label_column="Metadata_moa", overwrite=True))
    assert open_dataset(out).label_column == "Metadata_moa"
    assert list(tmp_path.iterdir()) == [out]


def children(pid: int) -> list[int]:
    """Process ids of a process's children; none where there is no /proc."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def running(pid: int) -> bool:
    """Whether a process is there and is more than an entry nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killed_anywhere_and_run_again_it_ends_with_the_same_bytes(simulated, command, tmp_path):
    """Real processes, SIGKILL at random points of segmenting and of writing; finished sites are left alone."""
    flags = ["--load-data", simulated / "load_data.csv", "--images", simulated, "--aggregate", "none"]
    flags += ["--segment-channels", "DNA", "--workers", 2, "--mask-cache", "none"]
    epoch = {"SOURCE_DATE_EPOCH": "1700000000"}
    assert command("build", *flags, "--out", tmp_path / "whole", **epoch).wait() == 0

    work = tmp_path / ".killed.building"
    draw = random.Random(time.time_ns())
    stages = [
        lambda: len(list(work.glob("masks/*.tiff"))) >= draw.randint(1, 12),
        lambda: len(list(work.glob("masks/*.tiff"))) >= 24 and draw.random() < 0.2,
        lambda: any(work.glob("dataset/tfds/**/*array_record*")),
    ]
    finished: dict[Path, int] = {}
    for reached in stages:
        process = command("build", *flags, "--out", tmp_path / "killed", **epoch)
        while process.poll() is None and not reached():
            time.sleep(0.002)
        helpers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        deadline = time.monotonic() + 20
        while any(map(running, helpers)):
            assert time.monotonic() < deadline, "workers outlived their parent"
            time.sleep(0.05)
        if (tmp_path / "killed").exists():
            break  # it was faster than the signal
        for path, written in finished.items():
            assert path.stat().st_mtime_ns == written, f"{path.name} was segmented again"
        finished = {path: path.stat().st_mtime_ns for path in work.glob("masks/[!.]*.tiff")}
        assert finished
    final = command("build", *flags, "--out", tmp_path / "killed", **epoch)
    said = final.communicate()[1]
    assert final.returncode == 0
    assert f"reused: {len(finished)} of 24 sites" in said or "already built" in said
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not work.exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_is_one_line_and_the_build_goes_on_after_it(simulated, command, tmp_path):
    flags = ["build", "--load-data", simulated / "load_data.csv", "--images", simulated, "--workers", 1]
    flags += ["--out", tmp_path / "dataset", "--mask-cache", "none"]
    process = command(*flags)
    while not list(tmp_path.glob(".dataset.building/masks/*.tiff")):
        assert process.poll() is None
        time.sleep(0.002)
    for helper in children(process.pid):
        if "spawn_main" in Path(f"/proc/{helper}/cmdline").read_text():
            os.kill(helper, signal.SIGKILL)
    said = process.communicate()[1]
    assert process.returncode == 2, said
    assert "error: a worker process was killed" in said and "Traceback" not in said
    assert not (tmp_path / "dataset").exists()
    assert command(*flags).wait() == 0
    assert len(open_dataset(tmp_path / "dataset")) == 24


def test_masks_are_kept_under_the_digest_of_their_pixels_and_settings(simulated, tmp_path, capsys):
    """Another dataset of the same images segments nothing; other settings and other pixels are segmented anew."""
    cache = {"mask_cache": str(tmp_path / "masks")}
    build(options(simulated, tmp_path / "one", **cache))
    kept = {path: path.stat().st_ino for path in (tmp_path / "masks").rglob("*.tiff")}
    assert len(kept) == 24
    capsys.readouterr()
    build(options(simulated, tmp_path / "two", label_column="Metadata_moa", resize=32, **cache))
    assert "reused: 24 of 24 sites" in capsys.readouterr().err
    one, two = open_dataset(tmp_path / "one"), open_dataset(tmp_path / "two")
    np.testing.assert_array_equal(resize_mask(one.pixels(3)[1], 32), two.pixels(3)[1])
    build(options(simulated, tmp_path / "three", diameter=20.0, **cache))
    assert "reused" not in capsys.readouterr().err
    assert {path: path.stat().st_ino for path in kept} == kept


def swap_pixels(plate: Path, site: str) -> None:
    """Other pixels under the same name, of the same size and date: only the content tells."""
    path = plate / f"images/SIM001/{site}_DNA.tiff"
    before = path.stat()
    tifffile.imwrite(path, tifffile.imread(path)[::-1].copy(), metadata=None)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_same_csv_with_other_images_is_not_already_built(plate, tmp_path, capsys):
    out = tmp_path / "dataset"
    build(options(plate, out))
    before = open_dataset(out).pixels(0)
    swap_pixels(plate, "SIM001_A01_s01")
    with pytest.raises(InputError, match=r"other images \(1 of 24 sites, first .*row 2\).*--overwrite"):
        build(options(plate, out))
    capsys.readouterr()
    build(options(plate, out, overwrite=True))
    assert "reused: 23 of 24" in capsys.readouterr().err
    for old, new in zip(before, open_dataset(out).pixels(0), strict=True):
        assert not np.array_equal(old, new)


def test_images_that_change_between_a_kill_and_its_resumption_get_masks_of_their_own(plate, command, tmp_path):
    flags = ["build", "--load-data", plate / "load_data.csv", "--images", plate, "--segment-channels", "DNA"]
    flags += ["--aggregate", "none", "--workers", 1, "--mask-cache", "none"]
    process = command(*flags, "--out", tmp_path / "killed")
    while not len(list(tmp_path.glob(".killed.building/masks/*.tiff"))) > 2:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    swap_pixels(plate, "SIM001_A01_s01")
    for out in ("killed", "fresh"):
        done = command(*flags, "--out", tmp_path / out, SOURCE_DATE_EPOCH="1700000000")
        assert done.communicate() and done.returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "fresh")


def test_a_damaged_mask_is_made_again_and_a_cache_that_cannot_be_written_is_done_without(simulated, tmp_path):
    cache = tmp_path / "masks"
    build(options(simulated, tmp_path / "one", mask_cache=str(cache)))
    for path in cache.rglob("*.tiff"):
        path.write_bytes(path.read_bytes()[:40])
    build(options(simulated, tmp_path / "two", mask_cache=str(cache)))
    (tmp_path / "file").touch()
    build(options(simulated, tmp_path / "three", mask_cache=str(tmp_path / "file/masks")))
    fingerprints = {open_dataset(tmp_path / name).fingerprint for name in ("one", "two", "three")}
    assert len(fingerprints) == 1


def test_the_cache_drops_what_was_used_longest_ago(tmp_path):
    store = MaskStore(tmp_path / "own", tmp_path / "cache")
    for number in range(4):
        store.keep(f"{number}" * 64, np.full((50, 50), number, np.uint16))
        os.utime(tmp_path / "cache" / f"{number}{number}" / (f"{number}" * 64 + ".tiff"), (number, number))
    MaskStore(tmp_path / "another", tmp_path / "cache").find("0" * 64)  # used now
    size = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tiff"))
    trim(tmp_path / "cache", most=size // 2)
    assert {path.name[0] for path in (tmp_path / "cache").rglob("*.tiff")} == {"0", "3"}


def test_two_builds_of_one_output_do_not_meet(simulated, tmp_path):
    import fcntl

    work = tmp_path / ".dataset.building"
    work.mkdir()
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another build is at work there"):
            build(options(simulated, tmp_path / "dataset"))
    assert not (tmp_path / "dataset").exists()


def replace(table: pd.DataFrame, row: int, column: str, value: str) -> pd.DataFrame:
    table.loc[row, column] = value
    return table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="Metadata_Well"), "load_data.csv: column Metadata_Well is missing"),
        (lambda t: t.iloc[:0], "load_data.csv: has a header but no rows"),
        (lambda t: t[[c for c in t if c.startswith("Metadata")]], "has no FileName_Orig<CHANNEL> column"),
        (lambda t: replace(t, 2, "FileName_OrigDNA", "gone.tiff"), "row 4, channel DNA: gone.tiff is neither in"),
        (lambda t: replace(t, 2, "FileName_OrigDNA", ""), "row 4, channel DNA: names no file"),
        (lambda t: replace(t, 2, "Metadata_Plate", ""), "row 4: Metadata_Plate is empty"),
        (lambda t: pd.concat([t, t.iloc[[3]]]), "rows 5 and 26: both are plate SIM001"),
        (lambda t: t[[c for c in t if "pert" not in c and "moa" not in c and "broad" not in c]], "--label-column"),
    ],
)
def test_a_bad_table_is_one_line_and_nothing_is_written(edit, refused, build_arguments, tmp_path, change, message):
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
        (["--label-column", "Metadata_gene"], "--label-column Metadata_gene: .*it has Metadata_Plate"),
        (["--aggregate", "none"], "--segment-channels"),
        (["--weights", "nuclei"], "the watershed has no weights"),
        (["--segmenter", "cellpose", "--weights", "cyto3"], "--segment-channels; there are DNA, Actin, Tubulin"),
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
def test_a_bad_flag_is_one_line_and_nothing_is_written(refused, build_arguments, tmp_path, flags, message):
    import re

    assert re.search(message, refused(*build_arguments(*flags)))
    assert [path.name for path in tmp_path.iterdir()] == ["plate"]


@pytest.mark.parametrize("kind", ["text", "truncated", "shape"])
def test_a_bad_image_is_told_of_before_anything_is_segmented(plate, refused, build_arguments, tmp_path, kind):
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


def test_an_image_that_claims_far_more_pixels_than_the_others_is_refused(plate, refused, build_arguments, tmp_path):
    for channel in ("DNA", "Actin", "Tubulin"):
        path = plate / f"images/SIM002/SIM002_A01_s02_{channel}.tiff"
        tifffile.imwrite(path, np.zeros((64, 64), np.uint16), compression="zlib", metadata=None, rowsperstrip=64)
        with tifffile.TiffFile(path, mode="r+") as tiff:
            for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
                tiff.pages[0].tags[tag].overwrite(6000)
    assert "row 15: its images claim 6000 x 6000 pixels" in refused(*build_arguments())
    assert [path.name for path in tmp_path.iterdir()] == ["plate"]


def test_an_output_that_cannot_be_written(refused, build_arguments, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be created" in refused(*build_arguments(out=tmp_path / "file" / "dataset"))
    assert "/proc" in refused(*build_arguments(out=Path("/proc/nowhere/dataset")))


def test_a_folder_that_is_no_dataset_is_left_alone_even_with_overwrite(refused, build_arguments, tmp_path):
    precious = tmp_path / "dataset" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    assert "exists and is not a dataset" in refused(*build_arguments("--overwrite"))
    assert precious.read_text() == "years of work"


def test_overwrite_deletes_no_file_of_the_users(plate, refused, build_arguments, tmp_path):
    build(options(plate, tmp_path / "dataset"))
    (tmp_path / "dataset" / "thesis.txt").write_text("years of work")
    assert "thesis.txt in it is no part of a dataset" in refused(*build_arguments("--overwrite"))
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
    return subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)


def test_a_disk_that_fills_up_while_shards_are_written_is_one_line(simulated, tmp_path):
    flags = ["build", "--load-data", simulated / "load_data.csv", "--images", simulated, "--workers", 1]
    flags += ["--segment-channels", "DNA", "--aggregate", "none", "--out", tmp_path / "dataset"]
    done = limited(flags, 300_000)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    assert not (tmp_path / "dataset").exists()
    assert subprocess.run([sys.executable, "-m", "data_prep", *map(str, flags)]).returncode == 0


def test_a_disk_that_fills_up_while_a_plate_is_drawn_is_one_line(tmp_path):
    done = limited(["simulate", "--out", tmp_path / "plate", "--wells", 4, "--compounds", 2], 20_000)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    assert not (tmp_path / "plate").exists()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="looks for semaphores there")
def test_builds_killed_with_all_their_processes_leave_no_semaphores(simulated, command, tmp_path):
    before = set(Path("/dev/shm").iterdir())
    process = command(
        *("build", "--load-data", simulated / "load_data.csv", "--images", simulated, "--out", tmp_path / "dataset"),
        *("--workers", 2, "--mask-cache", "none"),
        start_new_session=True,
    )
    while not list(tmp_path.glob(".dataset.building/masks/*.tiff")):
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not {path for path in Path("/dev/shm").iterdir() if path.name.startswith("sem.mp-")} - before


def spawned(pid: int) -> bool:
    """Whether a process is a worker."""
    try:
        return "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("delay", [0.0, 0.3, 0.8])
def test_ctrl_c_while_workers_start_prints_no_traceback_of_theirs(simulated, command, tmp_path, delay):
    process = command(
        *("build", "--load-data", simulated / "load_data.csv", "--images", simulated, "--out", tmp_path / "dataset"),
        *("--workers", 4),
        start_new_session=True,
    )
    while not any(map(spawned, children(process.pid))):
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[1]
    assert "Traceback" not in said, said
    assert process.returncode == 130 or (tmp_path / "dataset").exists()


@pytest.mark.parametrize("name", ["provenance.json", "index.parquet", "dataset_info.json"])
def test_an_incomplete_dataset_does_not_open(dataset, tmp_path, name):
    import shutil

    broken = Path(shutil.copytree(dataset, tmp_path / "broken"))
    (broken / name).unlink()
    with pytest.raises(InputError, match=f"is not a complete dataset .{name} is missing"):
        open_dataset(broken)


def test_a_dataset_of_another_schema_does_not_open(dataset, tmp_path):
    import shutil

    other = Path(shutil.copytree(dataset, tmp_path / "other"))
    provenance = json.loads((other / "provenance.json").read_text())
    (other / "provenance.json").write_text(json.dumps({**provenance, "schema_version": "0.9.0"}))
    with pytest.raises(InputError, match=r"was built with schema version 0\.9\.0"):
        open_dataset(other)


def test_a_dataset_that_lost_a_shard_does_not_open(dataset, tmp_path):
    import shutil

    broken = Path(shutil.copytree(dataset, tmp_path / "broken"))
    next(broken.glob("*array_record*")).unlink()
    with pytest.raises(InputError, match="build the dataset again"):
        open_dataset(broken).record(0)


MEMORY = """
import resource, sys
import numpy as np
import pandas as pd
from pathlib import Path
from perturbjax.dataset import SitePixels, write_dataset

count = int(sys.argv[2])
rng = np.random.default_rng(0)
mask = np.zeros((512, 1024), np.uint16)
sites = (SitePixels(rng.integers(0, 65535, (512, 1024, 1), np.uint16), mask) for _ in range(count))
table = pd.DataFrame({"site_id": [str(k) for k in range(count)], "Metadata_moa": "x"})
facts = {"channel_names": ["DNA"], "image_dtype": np.uint16, "label_column": "Metadata_moa"}
write_dataset(Path(sys.argv[1]), table, sites, **facts, pixel_bytes=count << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_does_not_grow_with_the_plate(tmp_path):
    """A hundred sites of 1 MB that do not compress, against ten: nothing is gathered before it is written."""

    def peak(count: int) -> float:
        command = [sys.executable, "-c", MEMORY, str(tmp_path / str(count)), str(count)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

    assert peak(100) - peak(10) < 45


def test_large_plates_are_split_into_shards(simulated, tmp_path, monkeypatch):
    from perturbjax.dataset import shards

    monkeypatch.setattr(shards, "SHARD_BYTES", 200_000)
    build(options(simulated, tmp_path / "dataset"))
    opened = open_dataset(tmp_path / "dataset")
    assert len(list((tmp_path / "dataset").glob("*array_record*"))) > 1
    assert [opened.record(i)["site_id"].decode() for i in range(24)] == list(opened.index["site_id"])
