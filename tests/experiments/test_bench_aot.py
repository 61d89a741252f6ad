"""Costs from the text of compiled programs, compared with stored baselines."""

from __future__ import annotations

import pytest

from experiments.bench import aot, hlo
from experiments.bench.tables import CannotRun
from perturbjax.core.errors import InputError
from perturbjax.core.files import read_json

TEXT = """HloModule jit_step, is_scheduled=true

%fused (p0: f32[8,100], p1: s32[2]) -> f32[2,100] {
  %p0 = f32[8,100]{1,0} parameter(0)
  %p1 = s32[2]{0} parameter(1)
  ROOT %gather.1 = f32[2,100]{1,0} gather(%p0, %p1), offset_dims={1}
}

%body (s: (f32[4], s32[])) -> (f32[4], s32[]) {
  %s = (f32[4]{0}, s32[]) parameter(0)
  %x = f32[4]{0} get-tuple-element(%s), index=0
  %i = s32[] get-tuple-element(%s), index=1
  %double.1 = f32[4]{0} add(%x, %x), metadata={op_name="jit(step)/transpose(jvp())/add"}
  ROOT %t = (f32[4]{0}, s32[]) tuple(%double.1, %i)
}

ENTRY %main (a: f32[8,100], b: s32[2], c: (f32[4], s32[])) -> f32[2,100] {
  %a = f32[8,100]{1,0:T(8,128)} parameter(0)
  %b = s32[2]{0} parameter(1)
  %c = (f32[4]{0}, s32[]) parameter(2)
  %picked = f32[2,100]{1,0} fusion(%a, %b), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/augment/gather"}
  %while.1 = (f32[4]{0}, s32[]) while(%c), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"18"}}
  %conv.1 = (bf16[10]{0}, u8[1000]{0}) custom-call(%picked), custom_call_target="conv"
  %all-reduce.1 = f32[2,100]{1,0} all-reduce(%picked), backend_config={"estimated_cycles":"700"}
  ROOT %sum = f32[2,100]{1,0} add(%picked, %all-reduce.1), metadata={op_name="a/update/add"},b={"estimated_cycles":"50"}
}
"""


def test_costs_counts_kernels_bytes_and_cycles():
    parts = hlo.costs(TEXT)
    whole = parts["all"]
    assert whole.kernels == 1 + 18 + 1 + 1 + 1
    assert whole.cycles == 750 and parts["update"].cycles == 50
    # A gather reads only its selection, a loop body counts per iteration, a workspace not at all.
    assert parts["augment"].moved == 800 + 8 + 800
    assert parts["backward"].moved == 18 * (3 * 16)
    assert whole.moved == 1608 + 18 * 48 + (20 + 800) + 1600 + 2400
    assert whole.collectives == 1 and whole.collective_bytes == 800
    assert whole.unestimated == {"fusion of gather": 1, "add": 18, "custom-call": 1}
    assert whole.unestimated_bytes == 1608 + 18 * 48 + 820


@pytest.mark.parametrize(
    ("test", "rounds"),
    [
        ("compare(%i, %n), direction=LT", 7),
        ("compare(%i, %n), direction=NE", 1),
        ("compare(%n, %i), direction=LT", 1),
    ],
)
def test_costs_takes_loop_iterations_from_the_condition(test, rounds):
    condition = f"""
%cond (s: (f32[4], s32[])) -> pred[] {{
  %s = (f32[4]{{0}}, s32[]) parameter(0)
  %n = s32[]{{:T(128)}} constant(7)
  %i = s32[] get-tuple-element(%s), index=1
  ROOT %lt = pred[] {test}
}}
"""
    text = condition + TEXT.replace(', backend_config={"known_trip_count":{"n":"18"}}', "")
    assert hlo.costs(text)["backward"].kernels == rounds


def test_part_of_uses_the_name_scope():
    assert hlo.part_of("jit(train_step)/augment/mul") == "augment"
    assert hlo.part_of("jit(train_step)/transpose(jvp())/mul") == "backward"
    assert hlo.part_of("jit(train_step)/jvp()/conv") == "forward"
    assert hlo.part_of("jit(epoch)/while/body/update/add") == "update"


def test_compile_all_reports_missing_compilers_and_wrong_names(monkeypatch):
    monkeypatch.setattr(aot, "_is_installed", lambda module: False)
    with pytest.raises(CannotRun, match="make aot-env"):
        next(aot.run(quick=True))
    with pytest.raises(InputError, match="--targets v9: unknown; choose among v5e, v6e, h100"):
        next(aot.compile_all(aot.Config(targets="v9")))
    with pytest.raises(InputError, match="--programs walk: unknown; choose among step bf16"):
        next(aot.compile_all(aot.Config(programs="walk")))


def test_merge_replaces_rows_of_the_same_program(tmp_path):
    path = tmp_path / "aot.json"
    for target, count, program, moved in (
        ("h100", 4, "step bf16", 1.0),
        ("v5e", 1, "epoch bf16", 2.0),
        ("h100", 4, "step bf16", 3.0),
    ):
        aot._merge(path, {"target": target, "devices": count, "program": program, "GB": moved})
    assert [(row["target"], row["GB"]) for row in read_json(path)["rows"]] == [
        ("v5e", 2.0),
        ("h100", 3.0),
    ]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", sorted(read_json(aot.BASELINES)))
def test_compiled_programs_cost_at_most_5_percent_more_than_baselines(name):
    """Needs the compilers: `make aot-env`, then .venv-aot/bin/python -m pytest."""
    target, count, program = name.split(" ", 2)
    try:
        mesh = aot.target_mesh(target, int(count.removeprefix("x")))
        row = aot.compile_one(program, target, mesh)
    except CannotRun as reason:
        pytest.skip(str(reason))
    for column, before in read_json(aot.BASELINES)[name].items():
        message = f"{column} of {name}: {before:.4g} before, {row[column]:.4g} now"
        assert row[column] <= 1.05 * before, message
