"""Tests of the checks for jobs of several processes."""

import jax
import pytest

from perturbjax.core.errors import InputError
from perturbjax.training import processes
from perturbjax.training.devices import choose_placement


@pytest.mark.parametrize(
    ("feed", "devices", "batch_size", "words"),
    [
        ("resident", "auto", 128, "--feed resident"),
        ("auto", "1", 128, "--devices 1"),
        ("streamed", "pmap", 128, "--devices pmap"),
        ("streamed", "sharded", 128, "--batch-size 128"),
    ],
)
def test_flags_that_need_one_process_are_refused(monkeypatch, feed, devices, batch_size, words):
    processes.require_supported_job(feed, devices, batch_size)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(InputError, match=words):
        processes.require_supported_job(feed, devices, batch_size)
    processes.require_supported_job("auto", "auto", 129)


def test_device_count_is_refused_with_several_processes(monkeypatch):
    assert choose_placement("sharded", 1).count == 1
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(InputError, match="device_count 1"):
        choose_placement("sharded", 1)


def test_run_on_first_process_with_one_process():
    assert processes.is_first_process()
    assert processes.run_on_first_process(lambda: 3, like=0) == 3
