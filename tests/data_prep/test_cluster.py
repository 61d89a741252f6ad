"""Builds on a Dask cluster equal local builds after failures of workers and scheduler."""

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

pytestmark = pytest.mark.full

pytest.importorskip("distributed")
#: Size of a shard in bytes; the small plate then has several.
SHARD_BYTES = 150_000


@pytest.fixture(autouse=True)
def fixed_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one creation time and small shards in all builds."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr(shards, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture
def local(simulated: Path, tmp_path: Path) -> dict[str, str]:
    """Checksums of a local build."""
    build(options(simulated, tmp_path / "local", mask_cache="none"))
    checksums = contents(tmp_path / "local")
    assert sum("array_record" in name for name in checksums) > 2
    return checksums


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def cluster_options(
    cluster: Cluster, plate: Path, out: Path, patience: float = 600.0, **changes
) -> BuildConfig:
    return options(
        plate,
        out,
        mask_cache="none",
        workers=0,
        where=ClusterConfig(cluster.address, patience=patience),
        **changes,
    )


def act_after(reached: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """Call `act` in a thread as soon as `reached` returns True."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while not reached():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def masks_written(tmp_path: Path, count: int) -> Callable[[], bool]:
    return lambda: len(list(tmp_path.glob(".far.building/masks/[!.]*.tiff"))) >= count


def test_killed_worker_does_not_change_the_result(simulated, cluster, local, tmp_path, capsys):
    """Stop the worker first, so that it certainly has tasks when it is killed."""
    killed, _ = cluster.add_worker(), cluster.add_worker()
    killed.send_signal(signal.SIGSTOP)
    killer = threading.Timer(3.0, killed.send_signal, (signal.SIGKILL,))
    killer.start()
    build(cluster_options(cluster, simulated, tmp_path / "far"))
    killer.join()
    assert killed.wait() == -signal.SIGKILL
    assert contents(tmp_path / "far") == local
    capsys.readouterr()
    build(cluster_options(cluster, simulated, tmp_path / "far"))
    assert "is already built" in capsys.readouterr().err


@pytest.mark.slow
def test_tasks_of_an_unresponsive_worker_are_restarted(simulated, cluster, local, tmp_path, capsys):
    stopped, _ = cluster.add_worker(), cluster.add_worker()
    stopped.send_signal(signal.SIGSTOP)
    build(cluster_options(cluster, simulated, tmp_path / "far", patience=6.0))
    assert contents(tmp_path / "far") == local
    stderr = capsys.readouterr().err
    assert "does not respond (a task exceeded 6 s); restarting its tasks on other workers" in stderr


def test_restarted_scheduler_receives_unfinished_tasks(simulated, cluster, local, tmp_path, capsys):
    first = cluster.add_worker()

    def restart() -> None:
        first.send_signal(signal.SIGSTOP)
        cluster.scheduler.send_signal(signal.SIGKILL)
        cluster.scheduler.wait()
        first.send_signal(signal.SIGKILL)
        first.wait()
        cluster.start_scheduler()
        cluster.add_worker()

    thread = act_after(masks_written(tmp_path, 3), restart)
    build(cluster_options(cluster, simulated, tmp_path / "far"))
    thread.join()
    assert contents(tmp_path / "far") == local
    stderr = capsys.readouterr().err
    assert "lost the scheduler" in stderr and "scheduler reconnected" in stderr


@pytest.mark.slow
def test_networks_on_workers_yield_the_same_masks(simulated, cluster, tmp_path):
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
    build(
        cluster_options(
            cluster, simulated, tmp_path / "far", segmenter="nuclei", illumination="estimate"
        )
    )
    assert contents(tmp_path / "far") == contents(tmp_path / "local")


def test_cluster_pool_keeps_order_and_raises_errors(cluster):
    cluster.add_worker()
    with ClusterPool(ClusterConfig(cluster.address)) as pool:
        assert list(pool.in_order(int, ["1", "2", "3"])) == [1, 2, 3]
        assert sorted(pool.as_completed(abs, range(-9, 0))) == list(range(1, 10))
        assert pool.call(max, (1, 2)) == 2
        with pytest.raises(RuntimeError, match="invalid literal"):
            list(pool.in_order(int, ["x"]))


def test_missing_scheduler_is_one_line_and_writes_nothing(
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
def test_cluster_config_refuses_invalid_values(changes, message):
    with pytest.raises(InputError, match=message):
        ClusterConfig(**changes)


def fake_slurm(folder: Path) -> Path:
    """Write `sbatch` that runs a copy of the job in the background, and `scancel` that ends all."""
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


def test_slurm_jobs_are_started_and_ended(simulated, local, tmp_path, monkeypatch, capsys):
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
