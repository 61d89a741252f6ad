"""What several processes cannot do is refused by the flag's name."""

import jax
import pytest

from perturbjax.core.errors import InputError
from perturbjax.training import processes as hosts
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
def test_impossible_for_three_processes(monkeypatch, feed, devices, batch_size, words):
    hosts.require_supported_job(feed, devices, batch_size)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(InputError, match=words):
        hosts.require_supported_job(feed, devices, batch_size)
    hosts.require_supported_job("auto", "auto", 129)


def test_several_processes_leave_no_device_out(monkeypatch):
    assert choose_placement("sharded", 1).count == 1
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(InputError, match="--device-count 1"):
        choose_placement("sharded", 1)


def test_one_process_does_its_own_work():
    assert hosts.is_first_process()
    assert hosts.run_on_first_process(lambda: 3, like=0) == 3
