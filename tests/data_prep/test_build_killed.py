"""A killed build resumes, yields the same bytes, and leaves no processes or files."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from data_prep_builds import children, contents, options, running, swap_pixels

from data_prep.build import build
from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset

pytestmark = pytest.mark.full


def test_killed_build_resumes_with_identical_result(simulated, command, tmp_path):
    """SIGKILL at random times during segmentation and writing; finished sites are not repeated."""
    flags = [
        "--load-data",
        simulated / "load_data.csv",
        "--images",
        simulated,
        "--aggregate",
        "none",
    ]
    flags += [
        "--segment-channels",
        "DNA",
        "--segmenter",
        "watershed",
        "--workers",
        2,
    ]
    epoch = {"SOURCE_DATE_EPOCH": "1700000000"}
    assert command("build", *flags, "--out", tmp_path / "whole", **epoch).wait() == 0

    work = tmp_path / ".killed.building"
    draw = random.Random(time.time_ns())
    stages = [
        lambda: len(list(work.glob("masks/[!.]*.tiff"))) >= draw.randint(1, 12),
        lambda: len(list(work.glob("masks/[!.]*.tiff"))) >= 24 and draw.random() < 0.2,
        lambda: any(work.glob("dataset/tfds/**/*array_record*")),
    ]
    finished: dict[Path, int] = {}
    for reached in stages:
        process = command("build", *flags, "--out", tmp_path / "killed", **epoch)
        while process.poll() is None and not reached():
            time.sleep(0.002)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        deadline = time.monotonic() + 20
        while any(map(running, workers)):
            assert time.monotonic() < deadline, "workers outlived their parent"
            time.sleep(0.05)
        if (tmp_path / "killed").exists():
            break  # the build finished before the signal
        for path, written in finished.items():
            assert path.stat().st_mtime_ns == written, f"{path.name} was segmented twice"
        finished = {path: path.stat().st_mtime_ns for path in work.glob("masks/[!.]*.tiff")}
        assert finished
    final = command("build", *flags, "--out", tmp_path / "killed", **epoch)
    stderr = final.communicate()[1]
    assert final.returncode == 0
    assert f"reused masks: {len(finished)} of 24 sites" in stderr or "already built" in stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not work.exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the workers in /proc")
def test_killed_worker_is_one_line_and_the_build_resumes(simulated, command, tmp_path):
    flags = [
        "build",
        "--load-data",
        simulated / "load_data.csv",
        "--images",
        simulated,
        "--workers",
        1,
    ]
    flags += ["--out", tmp_path / "dataset"]
    process = command(*flags)
    while not list(tmp_path.glob(".dataset.building/masks/*.tiff")):
        assert process.poll() is None
        time.sleep(0.002)
    for worker in children(process.pid):
        if "spawn_main" in Path(f"/proc/{worker}/cmdline").read_text():
            os.kill(worker, signal.SIGKILL)
    stderr = process.communicate()[1]
    assert process.returncode == 2, stderr
    assert "error: a worker process was killed" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "dataset").exists()
    assert command(*flags).wait() == 0
    assert len(open_dataset(tmp_path / "dataset")) == 24


def test_resumed_build_segments_changed_images_again(plate, command, tmp_path):
    flags = [
        "build",
        "--load-data",
        plate / "load_data.csv",
        "--images",
        plate,
        "--segment-channels",
        "DNA",
    ]
    flags += [
        "--aggregate",
        "none",
        "--segmenter",
        "watershed",
        "--workers",
        1,
    ]
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


def test_two_builds_of_one_output_exclude_each_other(simulated, tmp_path):
    import fcntl

    work = tmp_path / ".dataset.building"
    work.mkdir()
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is building this output"):
            build(options(simulated, tmp_path / "dataset"))
    assert not (tmp_path / "dataset").exists()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="looks for semaphores there")
def test_killed_build_leaves_no_semaphores(simulated, command, tmp_path):
    before = set(Path("/dev/shm").iterdir())
    process = command(
        *(
            "build",
            "--load-data",
            simulated / "load_data.csv",
            "--images",
            simulated,
            "--out",
            tmp_path / "dataset",
        ),
        *("--workers", 2),
        start_new_session=True,
    )
    while not list(tmp_path.glob(".dataset.building/masks/*.tiff")):
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert (
        not {path for path in Path("/dev/shm").iterdir() if path.name.startswith("sem.mp-")}
        - before
    )


def is_worker(pid: int) -> bool:
    """Return whether a process is a spawned worker."""
    try:
        return "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("delay", [0.0, 0.3, 0.8])
def test_ctrl_c_during_worker_start_prints_no_traceback(simulated, command, tmp_path, delay):
    process = command(
        *(
            "build",
            "--load-data",
            simulated / "load_data.csv",
            "--images",
            simulated,
            "--out",
            tmp_path / "dataset",
        ),
        *("--workers", 4),
        start_new_session=True,
    )
    while not any(map(is_worker, children(process.pid))):
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    stderr = process.communicate()[1]
    assert "Traceback" not in stderr, stderr
    assert process.returncode == 130 or (tmp_path / "dataset").exists()
