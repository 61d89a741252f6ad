"""A short storm, the same every time: what `make storm` does at length (see its `--help`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from tests.faults import files, kills
from tests.faults.arena import Arena, Ended
from tests.faults.hostile import hostile_files
from tests.faults.material import Material
from tests.faults.oddities import full_disks
from tests.faults.outcomes import GOOD, Finding, classify


@pytest.fixture(scope="module")
def arena(tmp_path_factory) -> Iterator[Arena]:
    with Arena(tmp_path_factory.mktemp("cache")) as arena:
        yield arena


@pytest.fixture(scope="module")
def made(arena, tmp_path_factory) -> Material:
    return Material(arena, tmp_path_factory.mktemp("storm") / "made")


def bad(found: Iterable[Finding]) -> list[Finding]:
    """What ended otherwise than right, in one line or killed; there must be something at all."""
    found = list(found)
    assert found
    return [one for one in found if one.outcome not in GOOD]


@pytest.mark.parametrize(
    "name", ["inspect, CSV", "inspect, CSV otherwise written", "split, dataset"]
)
def test_damaged_files_are_read_as_they_were_or_refused(arena, made, tmp_path, name):
    subject = next(subject for subject in files.subjects(made) if subject.name == name)
    assert not bad(files.storm(arena, subject, tmp_path, 2 * len(subject.mutations), seed=1))


@pytest.mark.slow
def test_hostile_files_are_refused_and_never_run(arena, made, tmp_path):
    assert not bad(hostile_files(arena, made, tmp_path))


@pytest.mark.parametrize("name", ["simulate, killed", "split, killed"])
def test_what_was_killed_ends_as_if_it_had_not_been(arena, made, tmp_path, name):
    target = next(target for target in kills.targets(made) if target.name == name)
    assert not bad(kills.storm(arena, target, tmp_path, 4, seed=1))


@pytest.mark.parametrize("name", ["simulate", "split"])
def test_a_full_disk_is_one_line_and_with_room_the_command_finishes(arena, made, tmp_path, name):
    assert not bad(full_disks(arena, made, tmp_path, name=name))


@pytest.mark.parametrize(
    ("ended", "same", "outcome"),
    [
        ({"status": 0}, True, "right"),
        ({"status": 0}, False, "silently different"),
        ({"status": 2, "stderr": "error: a: is damaged"}, False, "one line"),
        ({"status": 2, "stderr": "error: a\nerror: b"}, False, "traceback"),
        ({"status": 1}, False, "traceback"),
        ({"status": -11}, False, "traceback"),
        ({"status": 0, "stderr": "Traceback (most recent call last)"}, True, "traceback"),
        ({"status": 143, "signalled": True}, False, "killed"),
        ({"status": -9, "timed_out": True}, False, "hang"),
        ({"status": 2, "stderr": "error: a", "peak_bytes": 2**30 + 1}, False, "memory"),
    ],
)
def test_a_storm_sees_what_it_is_there_for(ended, same, outcome):
    quiet = {
        "seconds": 1.0,
        "peak_bytes": 0,
        "timed_out": False,
        "signalled": False,
        "stdout": "",
        "stderr": "",
    }
    assert classify(Ended(**{**quiet, **ended}), same=same) == outcome
    assert classify(Ended(**{**quiet, **ended}), same=same, executed=True) == "executed"
