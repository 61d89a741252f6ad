"""The benchmark runner: tables, benchmarks that cannot run, and the description of the machine."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import types

import pytest

from experiments.bench import __main__ as runner
from experiments.bench.tables import CannotRun, describe_machine, machine, markdown
from perturbjax.core.errors import InputError


@pytest.fixture
def benchmarks(monkeypatch):
    """Replace the benchmarks by three: one runs, one needs a device, one needs a package."""

    def add(name, run):
        module = types.ModuleType(
            f"experiments.bench.{name}", doc=f"How fast {name} is.\n\nDetails."
        )
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def lacks_device(quick):
        raise CannotRun("no\nGPU")

    def lacks_package(quick):
        import missing_package  # noqa: F401

    add("fast", lambda quick: [{"name": "step", "images/s": 12.3456, "quick": quick}])
    add("device", lacks_device)
    add("package", lacks_package)
    monkeypatch.setattr(runner, "NAMES", ("fast", "device", "package"))


def test_write_tables_gives_rows_or_the_reason(benchmarks, tmp_path):
    for name in runner.NAMES:
        runner.run_one(name, True, tmp_path)
    text = runner.write_tables(tmp_path).read_text()
    assert "| step | 12.35 | True |" in text
    assert "How fast fast is." in text and "Details" not in text
    assert "Not run: no GPU\n" in text
    assert "Not run: No module named 'missing_package'" in text
    parts = json.loads((tmp_path / "bench.json").read_text())
    assert parts["fast"]["rows"] == [{"name": "step", "images/s": 12.3456, "quick": True}]


def test_run_one_keeps_results_of_other_benchmarks(benchmarks, tmp_path):
    runner.run_one("fast", True, tmp_path)
    runner.run_one("device", False, tmp_path)
    runner.write_tables(tmp_path)
    assert set(json.loads((tmp_path / "bench.json").read_text())) == {"fast", "device"}


def test_main_refuses_times_from_a_busy_machine(benchmarks, tmp_path, monkeypatch):
    readme, out = tmp_path / "README.md", tmp_path / "out"
    readme.write_text(before := "<!-- bench fast -->\nold\n<!-- end bench -->\n")
    options = runner.Config(out=out, tables_only=True, readme=str(readme))
    monkeypatch.setattr(runner, "measure_load", lambda: 0.5)
    runner.run_one("fast", False, out)
    with pytest.raises(InputError, match="fast: other processes used 50% of the processors"):
        runner.main(options)
    monkeypatch.setattr(runner, "measure_load", lambda: 0.0)
    rows = [{"train spread": "0.90 to 1.80"}]
    monkeypatch.setattr(sys.modules["experiments.bench.fast"], "run", lambda quick: rows)
    runner.run_one("fast", False, out)
    with pytest.raises(InputError, match=r"fast: the times of one variant differ by .* 2.00"):
        runner.main(options)
    assert readme.read_text() == before
    runner.main(dataclasses.replace(options, even_busy=True))
    assert "0.90 to 1.80" in readme.read_text()


def test_run_one_saves_rows_after_every_step(benchmarks, tmp_path, monkeypatch):
    def run(quick):
        yield [{"row": 1}]
        assert json.loads((tmp_path / "fast.json").read_text())["rows"] == [{"row": 1}]
        raise RuntimeError("power failure")

    monkeypatch.setattr(sys.modules["experiments.bench.fast"], "run", run)
    with pytest.raises(RuntimeError):
        runner.run_one("fast", False, tmp_path)
    assert json.loads((tmp_path / "fast.json").read_text())["rows"] == [{"row": 1}]


def test_main_updates_only_measured_tables(benchmarks, tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    before = "# Speed\n<!-- bench fast -->\nold\n<!-- end bench -->\nend of page\n"
    before += "<!-- bench device -->\n| GPU |\n<!-- end bench -->\n"
    readme.write_text(before)
    monkeypatch.setattr(runner, "measure_load", lambda: 0.0)
    for name in ("fast", "device"):
        runner.run_one(name, False, tmp_path / "out")
    runner.main(runner.Config(out=tmp_path / "out", tables_only=True, readme=str(readme)))
    table = markdown([{"name": "step", "images/s": 12.3456, "quick": False}])
    assert readme.read_text() == before.replace(
        "old\n", f"{table}\nMeasured on {describe_machine(machine())}.\n"
    )
    readme.write_text("no markers")
    with pytest.raises(InputError, match="no table between <!-- bench NAME -->"):
        runner.main(runner.Config(out=tmp_path / "out", readme=str(readme)))
    with pytest.raises(InputError, match="no such file"):
        runner.main(runner.Config(out=tmp_path / "out", readme=str(tmp_path / "absent.md")))


def test_run_one_lists_benchmarks_if_the_name_is_unknown(benchmarks, tmp_path):
    with pytest.raises(InputError, match=r"--only slow: unknown .* one of fast, device, package"):
        runner.run_one("slow", True, tmp_path)


def test_markdown_has_one_line_per_row():
    text = markdown([{"a": 1, "b": "x|y"}, {"a": 20000.123, "c": None, "b": "two\nlines"}])
    assert text.splitlines() == [
        "| a | b | c |",
        "|---:|---|---|",
        "| 1 | x\\|y |  |",
        "| 20000 | two lines |  |",
    ]


def test_machine_omits_the_host_name():
    facts = machine()
    assert int(facts["cores"]) >= 1 and facts["jax"]
    name = platform.node()
    assert not name or name not in json.dumps(facts)
