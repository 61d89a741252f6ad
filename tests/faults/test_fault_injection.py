"""A short, reproducible selection of the fault-injection tests (`make faults` runs all)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from tests.faults.arena import CommandServer, Result
from tests.faults.files import damage_suites, run_damage_cases
from tests.faults.hostile import hostile_files
from tests.faults.images import FORMATS, hostile_images
from tests.faults.kills import kill_suites, run_kill_cases
from tests.faults.material import Material
from tests.faults.oddities import full_disks
from tests.faults.outcomes import ALLOWED, Finding, classify
from tests.faults.servers import hostile_servers


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[CommandServer]:
    with CommandServer(tmp_path_factory.mktemp("cache")) as server:
        yield server


@pytest.fixture(scope="module")
def material(server, tmp_path_factory) -> Material:
    return Material(server, tmp_path_factory.mktemp("faults") / "material")


def failures(findings: Iterable[Finding]) -> list[Finding]:
    """Return the cases with an outcome that is not allowed; there must be at least one case."""
    findings = list(findings)
    assert findings
    return [one for one in findings if one.outcome not in ALLOWED]


@pytest.mark.parametrize(
    "name", ["inspect, CSV", "inspect, CSV in other formats", "split, dataset"]
)
def test_damaged_files_give_the_same_result_or_are_refused(server, material, tmp_path, name):
    suite = next(suite for suite in damage_suites(material) if suite.name == name)
    count = 2 * len(suite.mutations)
    assert not failures(run_damage_cases(server, suite, tmp_path, count, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("suite", [hostile_files, hostile_images, hostile_servers])
def test_hostile_input_is_refused_and_never_executed(server, material, tmp_path, suite):
    assert not failures(suite(server, material, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["report, evaluation", "verify, checkpoint", *(f"half-written, {n}" for n in FORMATS)]
)
def test_damaged_results_and_half_written_images_are_refused(server, material, tmp_path, name):
    suite = next(suite for suite in damage_suites(material) if suite.name == name)
    assert not failures(run_damage_cases(server, suite, tmp_path, 12, seed=1))


@pytest.mark.parametrize("name", ["simulate, killed", "split, killed"])
def test_killed_commands_finish_with_the_same_result(server, material, tmp_path, name):
    suite = next(suite for suite in kill_suites(material) if suite.name == name)
    assert not failures(run_kill_cases(server, suite, tmp_path, 4, seed=1))


@pytest.mark.parametrize("name", ["simulate", "split"])
def test_full_disk_is_refused_and_the_command_finishes_later(server, material, tmp_path, name):
    assert not failures(full_disks(server, material, tmp_path, name=name))


@pytest.mark.parametrize(
    ("result", "correct", "outcome"),
    [
        ({"status": 0}, True, "correct"),
        ({"status": 0}, False, "wrong result"),
        ({"status": 2, "stderr": "error: a: is damaged"}, False, "refused"),
        ({"status": 2, "stderr": "error: a\nerror: b"}, False, "traceback"),
        ({"status": 1}, False, "traceback"),
        ({"status": -11}, False, "traceback"),
        ({"status": 0, "stderr": "Traceback (most recent call last)"}, True, "traceback"),
        ({"status": 143, "signalled": True}, False, "killed"),
        ({"status": -9, "timed_out": True}, False, "hang"),
        ({"status": 2, "stderr": "error: a", "peak_bytes": 2**30 + 1}, False, "memory"),
    ],
)
def test_classify_detects_every_outcome(result, correct, outcome):
    defaults = {"seconds": 1.0, "peak_bytes": 0, "timed_out": False, "signalled": False}
    defaults |= {"stdout": "", "stderr": ""}
    assert classify(Result(**{**defaults, **result}), correct=correct) == outcome
    executed = classify(Result(**{**defaults, **result}), correct=correct, executed=True)
    assert executed == "executed"
