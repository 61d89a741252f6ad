"""The benchmark runner gathers what ran, says what could not, and tells nothing about whose machine it is."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import types

import pytest

from experiments.bench import __main__ as runner
from experiments.bench.tables import CannotRun, machine, markdown, where
from perturbjax.core.errors import InputError


@pytest.fixture
def benchmarks(monkeypatch):
    """Three modules: one that measures, one that lacks a device, one that lacks a package."""

    def add(name, run):
        module = types.ModuleType(
            f"experiments.bench.{name}", doc=f"How fast {name} is.\n\nDetails."
        )
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def lacks_device(quick):
        raise CannotRun("no GPU\nhere")

    def lacks_package(quick):
        import a_package_that_nobody_has  # noqa: F401

    add("fast", lambda quick: [{"what": "step", "images/s": 12.3456, "quick": quick}])
    add("device", lacks_device)
    add("package", lacks_package)
    monkeypatch.setattr(runner, "NAMES", ("fast", "device", "package"))


def test_what_ran_is_in_the_table_and_what_could_not_says_why(benchmarks, tmp_path):
    for name in runner.NAMES:
        runner.run_one(name, True, tmp_path)
    text = runner.write_tables(tmp_path).read_text()
    assert "| step | 12.35 | True |" in text
    assert "How fast fast is." in text and "Details" not in text
    assert "Not run here: no GPU here" in text
    assert "Not run here: No module named 'a_package_that_nobody_has'" in text
    parts = json.loads((tmp_path / "bench.json").read_text())
    assert parts["fast"]["rows"] == [{"what": "step", "images/s": 12.3456, "quick": True}]


def test_measuring_one_again_keeps_the_others(benchmarks, tmp_path):
    runner.run_one("fast", True, tmp_path)
    runner.run_one("device", False, tmp_path)
    runner.write_tables(tmp_path)
    assert set(json.loads((tmp_path / "bench.json").read_text())) == {"fast", "device"}


def test_times_from_a_busy_machine_or_far_apart_are_not_put_into_a_readme(
    benchmarks, tmp_path, monkeypatch
):
    readme, out = tmp_path / "README.md", tmp_path / "out"
    readme.write_text(before := "<!-- bench fast -->\nold\n<!-- end bench -->\n")
    options = runner.Config(out=out, tables_only=True, readme=str(readme))
    monkeypatch.setattr(runner, "others_busy", lambda: 0.5)
    runner.run_one("fast", False, out)
    with pytest.raises(InputError, match="fast: 50% of the processors were busy with other work"):
        runner.main(options)
    monkeypatch.setattr(runner, "others_busy", lambda: 0.0)
    rows = [{"train spread": "0.90 to 1.80"}]
    monkeypatch.setattr(sys.modules["experiments.bench.fast"], "run", lambda quick: rows)
    runner.run_one("fast", False, out)
    with pytest.raises(InputError, match=r"fast: the times of one way lie 2.00 to 1 apart"):
        runner.main(options)
    assert readme.read_text() == before
    runner.main(dataclasses.replace(options, even_busy=True))
    assert "0.90 to 1.80" in readme.read_text()


def test_rows_are_saved_as_they_come(benchmarks, tmp_path, monkeypatch):
    def run(quick):
        yield [{"row": 1}]
        assert json.loads((tmp_path / "fast.json").read_text())["rows"] == [{"row": 1}]
        raise RuntimeError("the power went")

    monkeypatch.setattr(sys.modules["experiments.bench.fast"], "run", run)
    with pytest.raises(RuntimeError):
        runner.run_one("fast", False, tmp_path)
    assert json.loads((tmp_path / "fast.json").read_text())["rows"] == [{"row": 1}]


def test_a_readme_s_tables_are_renewed_from_what_was_measured_and_all_else_stays(
    benchmarks, tmp_path, monkeypatch
):
    readme = tmp_path / "README.md"
    before = "# Speed\n<!-- bench fast -->\nold\n<!-- end bench -->\nkept\n"
    before += "<!-- bench device -->\n| GPU |\n<!-- end bench -->\n"
    readme.write_text(before)
    monkeypatch.setattr(runner, "others_busy", lambda: 0.0)
    for name in ("fast", "device"):
        runner.run_one(name, False, tmp_path / "out")
    runner.main(runner.Config(out=tmp_path / "out", tables_only=True, readme=str(readme)))
    table = markdown([{"what": "step", "images/s": 12.3456, "quick": False}])
    assert readme.read_text() == before.replace(
        "old\n", f"{table}\nMeasured on {where(machine())}.\n"
    )
    readme.write_text("no markers")
    with pytest.raises(InputError, match="nothing between <!-- bench NAME -->"):
        runner.main(runner.Config(out=tmp_path / "out", readme=str(readme)))
    with pytest.raises(InputError, match="no such file"):
        runner.main(runner.Config(out=tmp_path / "out", readme=str(tmp_path / "absent.md")))


def test_an_unknown_benchmark_is_refused_and_the_message_lists_those_there_are(
    benchmarks, tmp_path
):
    with pytest.raises(
        InputError, match="--only slow: no such benchmark; choose one of fast, device, package"
    ):
        runner.run_one("slow", True, tmp_path)


def test_a_table_has_every_column_once_and_stays_one_row_a_line():
    text = markdown([{"a": 1, "b": "x|y"}, {"a": 20000.123, "c": None, "b": "two\nlines"}])
    assert text.splitlines() == [
        "| a | b | c |",
        "|---:|---|---|",
        "| 1 | x\\|y |  |",
        "| 20000 | two lines |  |",
    ]


def test_the_machine_is_described_without_its_name():
    facts = machine()
    assert int(facts["cores"]) >= 1 and facts["jax"]
    name = platform.node()
    assert not name or name not in json.dumps(facts)
