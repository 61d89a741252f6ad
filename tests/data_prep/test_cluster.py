"""A cluster makes the same bytes as one process, whatever is killed, hangs or starts again."""

from __future__ import annotations

import dataclasses
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dask_cluster import Cluster
from data_prep_builds import contents, options

from data_prep import cluster as engine
from data_prep.build import BuildConfig, build
from data_prep.cluster import ClusterConfig, ClusterPool
from perturbjax.core.errors import InputError
from perturbjax.dataset import shards

pytest.importorskip("distributed")
#: Bytes of a shard, so that the small plate has several.
SHARD = 150_000


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """One date, and small shards, for all builds."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr(shards, "SHARD_BYTES", SHARD)


@pytest.fixture
def local(simulated: Path, tmp_path: Path) -> dict[str, str]:
    """What one process makes of the plate."""
    build(options(simulated, tmp_path / "local", mask_cache="none"))
    made = contents(tmp_path / "local")
    assert sum("array_record" in name for name in made) > 2
    return made


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.close()


def on(cluster: Cluster, plate: Path, out: Path, patience: float = 600.0, **changes) -> BuildConfig:
    return options(
        plate,
        out,
        mask_cache="none",
        workers=0,
        where=ClusterConfig(cluster.address, patience=patience),
        **changes,
    )


def after(reached: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """Act as soon as something is reached, while the build goes on."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while not reached():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def masks(tmp_path: Path, count: int) -> Callable[[], bool]:
    return lambda: len(list(tmp_path.glob(".far.building/masks/[!.]*.tiff"))) >= count


def test_a_killed_worker_loses_nothing(simulated, cluster, local, tmp_path, capsys):
    """It is stopped first, so that it surely holds tasks when it is killed, and nothing ends without them."""
    doomed, _ = cluster.add_worker(), cluster.add_worker()
    doomed.send_signal(signal.SIGSTOP)
    killer = threading.Timer(3.0, doomed.send_signal, (signal.SIGKILL,))
    killer.start()
    build(on(cluster, simulated, tmp_path / "far"))
    killer.join()
    assert doomed.wait() == -signal.SIGKILL
    assert contents(tmp_path / "far") == local
    capsys.readouterr()
    build(on(cluster, simulated, tmp_path / "far"))
    assert "is already built" in capsys.readouterr().err


@pytest.mark.slow
def test_a_worker_that_hangs_loses_its_tasks_to_others_and_it_is_said(
    simulated, cluster, local, tmp_path, capsys
):
    hung, _ = cluster.add_worker(), cluster.add_worker()
    hung.send_signal(signal.SIGSTOP)
    build(on(cluster, simulated, tmp_path / "far", patience=6.0))
    assert contents(tmp_path / "far") == local
    said = capsys.readouterr().err
    assert "does not respond (a task exceeded 6 s); restarting its tasks on other workers" in said


def test_a_scheduler_that_is_started_again_is_given_what_is_not_done(
    simulated, cluster, local, tmp_path, capsys
):
    first = cluster.add_worker()

    def restart() -> None:
        first.send_signal(signal.SIGSTOP)
        cluster.scheduler.send_signal(signal.SIGKILL)
        cluster.scheduler.wait()
        first.send_signal(signal.SIGKILL)
        first.wait()
        cluster.start_scheduler()
        cluster.add_worker()

    thread = after(masks(tmp_path, 3), restart)
    build(on(cluster, simulated, tmp_path / "far"))
    thread.join()
    assert contents(tmp_path / "far") == local
    said = capsys.readouterr().err
    assert "lost the scheduler" in said and "scheduler reconnected" in said


@pytest.mark.slow
def test_networks_run_in_the_workers_and_find_the_same_cells(simulated, cluster, tmp_path):
    cluster.add_worker()
    build(
        options(
            simulated,
            tmp_path / "local",
            segmenter="nuclei",
            mask_cache="none",
            illumination="estimate",
        )
    )
    build(on(cluster, simulated, tmp_path / "far", segmenter="nuclei", illumination="estimate"))
    assert contents(tmp_path / "far") == contents(tmp_path / "local")


def test_results_come_in_order_and_errors_as_they_were_raised(cluster):
    cluster.add_worker()
    with ClusterPool(ClusterConfig(cluster.address)) as pool:
        assert list(pool.in_order(int, ["1", "2", "3"])) == [1, 2, 3]
        assert sorted(pool.as_completed(abs, range(-9, 0))) == list(range(1, 10))
        assert pool.call(max, (1, 2)) == 2
        with pytest.raises(RuntimeError, match="invalid literal"):
            list(pool.in_order(int, ["x"]))


def test_no_scheduler_is_one_line_and_nothing_is_written(
    refused, build_arguments, tmp_path, monkeypatch
):
    monkeypatch.setattr(engine, "CONNECT_S", 0.5)
    line = refused(*build_arguments("--cluster", "tcp://127.0.0.1:9"))
    assert "--cluster tcp://127.0.0.1:9: no scheduler is reachable" in line
    assert [path.name for path in tmp_path.iterdir()] == ["plate"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": "host"}, "--cluster host: must be tcp://HOST:PORT, slurm or slurm:FILE.yaml"),
        ({"patience": 0.0}, "--patience 0.0: must be 1 second or more"),
    ],
)
def test_flags_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        ClusterConfig(**changes)


def fake_slurm(folder: Path) -> Path:
    """`sbatch` that runs its copy of a job at once, in the background, and `scancel` that ends all of them."""
    folder.mkdir()
    run = f'cp "$1" {folder}/job.sh; setsid bash {folder}/job.sh >> {folder}/log 2>&1 < /dev/null &'
    end = f"for pid in $(cat {folder}/pids); do kill -KILL -- -$pid; done"
    for name, words in (
        ("sbatch", f'{run} echo $! >> {folder}/pids; echo "job $!"'),
        ("scancel", end),
    ):
        (folder / name).write_text(f"#!/bin/bash\n{words}\n")
        (folder / name).chmod(stat.S_IRWXU)
    return folder


def test_jobs_of_slurm_are_started_and_ended(simulated, local, tmp_path, monkeypatch, capsys):
    bin = fake_slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    settings = {"jobs": 1, "cores": 1, "memory": "2GB", "interface": "lo", "python": sys.executable}
    file = tmp_path / "options.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    config = options(
        simulated, tmp_path / "far", mask_cache="none", where=ClusterConfig(f"slurm:{file}")
    )
    try:
        build(config)
    finally:
        os.system(f"{bin}/scancel 2> /dev/null")
    assert contents(tmp_path / "far") == local
    assert "submitted 1 Slurm jobs" in capsys.readouterr().err
    file.write_text("corse: 1\n")
    with pytest.raises(InputError, match="corse is not an option of dask-jobqueue's SLURMCluster"):
        build(dataclasses.replace(config, out=tmp_path / "other"))
    file.write_text("jobs: many\n")
    with pytest.raises(InputError, match="jobs is 'many'; it must be a number"):
        build(dataclasses.replace(config, out=tmp_path / "other"))
    file.write_text("[1\n")
    with pytest.raises(InputError, match="cannot be read"):
        build(dataclasses.replace(config, out=tmp_path / "other"))
