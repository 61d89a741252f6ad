"""Tests of the profile of training steps: times by part and operation, and the trace files."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from perturbjax.training import profile
from perturbjax.training.profile import (
    Span,
    operation_names,
    read_spans,
    sum_by_operation,
    trace_steps,
)

HLO = """HloModule jit_step
%fused_computation.1 (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %convolution.2 = f32[8]{0} convolution(%p), metadata={op_name="jit(step)/transpose(jvp())/conv_general_dilated"}
}

ENTRY %main.9 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0), metadata={op_name="x"}
  %ynn_fusion.5 = f32[8]{0} fusion(%x), kind=kCustom, calls=%fused_computation.1
  ROOT add.1 = f32[8]{0} add(%ynn_fusion.5, %x), metadata={op_name="jit(step)/update/add" stack_frame_id=3}
}
"""


def test_operation_names_of_fusion_come_from_its_last_operation():
    names = operation_names(HLO)
    assert names["ynn_fusion.5"].endswith("transpose(jvp())/conv_general_dilated")
    assert names["add.1"] == "jit(step)/update/add"


def test_sum_by_operation_counts_nested_time_once():
    names = {("m", name): full for name, full in operation_names(HLO).items()}
    spans = [
        Span(0.0, 10.0, "m", "while.3"),
        Span(1.0, 4.0, "m", "ynn_fusion.5"),
        Span(4.0, 6.0, "m", "add.1"),
        Span(12.0, 13.0, "m", "add.1"),
    ]
    sums = {
        (part, operation): seconds
        for part, operation, seconds in sum_by_operation([spans, spans[3:]], names)
    }
    assert sums == {
        ("other", "while"): 5.0,
        ("backward", "conv_general_dilated"): 3.0,
        ("update", "add"): 4.0,
    }


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """Trace of a step with a matrix product and its gradient."""
    folder = tmp_path_factory.mktemp("profile") / "trace"

    @jax.jit
    def step(state):
        gradient = jax.grad(lambda w: jnp.sum(jnp.tanh(w @ w) ** 2))(state["w"])
        with jax.named_scope("update"):
            return {"w": state["w"] - 1e-3 * jnp.cos(gradient)}

    state = {"w": jnp.full((600, 600), 0.01)}
    times = trace_steps(lambda state: step(step(state)), state, folder, steps=2)
    return folder, state, times


def test_trace_steps_assigns_operations_to_parts(traced):
    _, _, times = traced
    assert {"forward", "backward"} <= {row.part for row in times if row.operation == "dot_general"}
    assert "update" in {row.part for row in times}
    assert all(row.seconds >= 0 for row in times)


def test_trace_files_contain_the_operations_and_state_is_unchanged(traced):
    folder, state, _ = traced
    with gzip.open(next(folder.rglob("perfetto_trace.json.gz"))) as file:
        events = json.load(file)["traceEvents"]
    names = {event["name"] for event in events if event.get("ph") == "X"}
    spans = [span for line in read_spans(next(folder.rglob("*.xplane.pb"))) for span in line]
    assert spans and {span.operation for span in spans} <= names
    assert all(0 <= span.end - span.start < 60 for span in spans)
    assert not state["w"].is_deleted(), "the state was donated"


def test_read_spans_prefers_device_timeline_to_host(monkeypatch, tmp_path):
    class Event:
        start_ns, end_ns = 0.0, 5.0
        stats = (("hlo_op", "add.1"), ("hlo_module", "m"))

    class Line:
        def __init__(self, count):
            self.events = [Event()] * count

    class Plane:
        def __init__(self, name, count):
            self.name, self.lines = name, [Line(count)]

    class Trace:
        planes = (Plane("/host:CPU", 7), Plane("/device:GPU:0", 2))

    monkeypatch.setattr(profile.jax.profiler.ProfileData, "from_file", lambda path: Trace)
    assert [len(spans) for spans in read_spans(tmp_path)] == [2]
