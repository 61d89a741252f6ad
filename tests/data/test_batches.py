"""Resident and streamed batches are equal and depend on (seed, epoch, step) only."""

from __future__ import annotations

import dataclasses
import multiprocessing
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbjax.core.config import AugmentConfig, InputConfig
from perturbjax.core.errors import InputError
from perturbjax.data import mask_encodings as masks
from perturbjax.data.augmentation import prepare
from perturbjax.data.batches import (
    BatchOrder,
    Decoder,
    RawBatch,
    ResidentBatches,
    StreamedBatches,
    describe_sites,
    open_batches,
    resident_bytes,
    selection,
    shuffle_epoch,
    split_into_batches,
)
from perturbjax.data.normalization import count_input_channels
from perturbjax.dataset import PLATE, SITE, WELL, SitePixels, open_dataset, write_dataset
from perturbjax.training.devices import Placement, choose_placement

pytestmark = pytest.mark.full

SITES, HEIGHT, WIDTH, BATCH, SEED = 37, 20, 18, 8, 5
CHANNELS = ["DNA", "Actin"]
RECORDS = np.arange(3, SITES, dtype=np.int32)  # records of the training set
INPUT = InputConfig(normalize="plate", mask_encoding="distance")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """37 sites of noise with square cells, on three plates of different intensity."""
    random = np.random.default_rng(0)
    sites, rows = [], []
    for n in range(SITES):
        image = random.normal(1000 + 2000 * (n % 3), 100 + n, (HEIGHT, WIDTH, 2)).astype(np.uint16)
        mask = np.kron(random.integers(0, 4, (4, 3)), np.ones((5, 6), int)).astype(np.uint16)
        metadata = {
            PLATE: f"P{n % 3}",
            WELL: f"A{n % 5:02d}",
            SITE: str(n),
            "Metadata_moa": f"moa{n % 2}",
        }
        sites.append(SitePixels(image, mask))
        rows.append({"site_id": f"s{n}", **metadata, "Metadata_pert_iname": f"drug{n % 4}"})
    folder = write_dataset(
        tmp_path_factory.mktemp("batches"),
        pd.DataFrame(rows),
        sites,
        channel_names=CHANNELS,
        image_dtype=np.uint16,
        label_column="Metadata_pert_iname",
    )
    return open_dataset(folder)


@pytest.fixture(scope="module")
def placement() -> Placement:
    return choose_placement("1")


def decoder(dataset, input=INPUT, augment=None) -> Decoder:
    return Decoder(dataset, describe_sites(dataset, input, seed=SEED), input, augment)


ORDER = BatchOrder.shuffled_epochs(SEED, RECORDS, BATCH, epochs=10)
STEPS = ORDER.steps_per_epoch


def epochs(first: int, stop: int) -> BatchOrder:
    return ORDER.select_steps(first * STEPS, stop * STEPS)


def assert_same(first: list[RawBatch], second: list[RawBatch]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        for name, a, b in zip(RawBatch._fields, one, other, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            assert np.array_equal(a, b), name


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5), st.integers(0, 2**31))
def test_shuffle_epoch_visits_each_record_once(n, batch_size, epoch, seed):
    records = np.random.default_rng(n).choice(1000, n, replace=False)
    indices, weight = shuffle_epoch(seed, epoch, records, batch_size)
    assert indices.shape == weight.shape == (-(-n // batch_size), batch_size)
    assert sorted(indices[weight == 1]) == sorted(records)
    assert set(indices.ravel()) <= set(records)
    again, _ = shuffle_epoch(seed, epoch, records, batch_size)
    assert np.array_equal(indices, again)


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 9))
def test_shuffle_epoch_with_fixed_steps_balances_visits(n, batch_size, steps):
    indices, weight = shuffle_epoch(SEED, 3, np.arange(n), batch_size, steps)
    assert indices.shape == (steps, batch_size) and (weight == 1).all()
    visits = np.bincount(indices.ravel(), minlength=n)
    assert visits.max() - visits.min() <= 1
    order = BatchOrder.shuffled_epochs(SEED, np.arange(n), batch_size, epochs=4, steps=steps)
    assert order.steps_per_epoch == steps and len(order) == 4 * steps
    assert np.array_equal(order[3 * steps].positions, indices[0])


def test_shuffle_epoch_depends_on_epoch_and_seed():
    first, other_epoch, other_seed = (
        shuffle_epoch(s, e, RECORDS, 8)[0] for s, e in ((0, 0), (0, 1), (1, 0))
    )
    assert not np.array_equal(first, other_epoch)
    assert not np.array_equal(first, other_seed)


def test_split_into_batches_keeps_order_and_pads_the_end():
    indices, weight = split_into_batches(np.arange(10), 4)
    assert np.array_equal(indices.ravel()[:10], np.arange(10))
    assert np.array_equal(weight.ravel(), [1] * 10 + [0] * 2)


def test_order_of_several_epochs_concatenates_epochs():
    shuffled = [shuffle_epoch(SEED, epoch, RECORDS, BATCH) for epoch in range(10)]
    for kind in (0, 1):
        steps = np.stack([ORDER[step][kind] for step in range(len(ORDER))])
        assert np.array_equal(steps, np.concatenate([rows[kind] for rows in shuffled]))
    middle = ORDER.select_steps(2 * STEPS + 3, 4 * STEPS + 1)
    assert [len(steps) for steps in middle.steps_by_epoch()] == [STEPS - 3, STEPS, 1]
    assert np.array_equal(middle[0].positions, shuffled[2].positions[3])
    whole = np.concatenate(
        [middle.records_of(steps).positions for steps in middle.steps_by_epoch()]
    )
    assert np.array_equal(whole, np.stack([middle[step].positions for step in range(len(middle))]))
    assert ORDER.select_steps(5, 5).steps_by_epoch() == []
    assert np.array_equal(pickle.loads(pickle.dumps(middle))[4].positions, middle[4].positions)


@pytest.mark.parametrize("mask_use", ["keep", "shuffle"])
def test_resident_and_streamed_batches_are_identical(dataset, placement, mask_use):
    source = decoder(dataset, dataclasses.replace(INPUT, mask_use=mask_use))
    with (
        ResidentBatches.load(source, placement) as resident,
        StreamedBatches(source, placement) as streamed,
    ):
        assert_same(list(resident.batches(epochs(0, 2))), list(streamed.batches(epochs(0, 2))))


def test_batches_contain_the_pixels_of_the_dataset(dataset, placement):
    source = decoder(dataset)
    with StreamedBatches(source, placement) as streamed:
        batch = next(streamed.batches(ORDER))
    for row, position in enumerate(np.asarray(batch.record)):
        record = dataset.record(position)
        assert np.array_equal(batch.image[row], record["image"])
        assert np.array_equal(batch.mask[row], masks.encode(record["mask"], "distance"))
        assert source.sites.class_names[batch.label[row]] == f"drug{position % 4}"


def test_streams_start_at_any_step_and_run_concurrently(dataset, placement):
    source = decoder(dataset)
    with (
        ResidentBatches.load(source, placement) as resident,
        StreamedBatches(source, placement) as streamed,
    ):
        stretch = ORDER.select_steps(4 * STEPS + 3, 6 * STEPS)
        whole = list(resident.batches(stretch))
        training = streamed.batches(stretch)
        assert_same([next(training)], whole[:1])
        evaluation = BatchOrder.single_pass(np.arange(SITES), 5)
        assert_same(list(streamed.batches(evaluation)), list(resident.batches(evaluation)))
        assert_same(list(training), whole[1:])


def test_worker_processes_give_identical_batches_and_end_on_close(dataset, placement):
    source = decoder(dataset)
    with (
        ResidentBatches.load(source, placement) as resident,
        StreamedBatches(source, placement, workers=2) as streamed,
    ):
        whole = resident.batches(ORDER)
        training = streamed.batches(ORDER)
        first = [next(training)]
        processes = {process.pid for process in multiprocessing.active_children()}
        assert len(processes) == 2
        first += [next(training) for _ in range(2 * STEPS)]
        assert_same(first, [next(whole) for _ in first])
        assert {process.pid for process in multiprocessing.active_children()} == processes
        list(streamed.batches(BatchOrder.single_pass(np.arange(SITES), BATCH)))
        assert len(multiprocessing.active_children()) == 2, (
            "a single pass started additional processes"
        )
    assert not multiprocessing.active_children()


def test_for_process_parts_combine_to_the_batch(dataset):
    source, order = decoder(dataset), epochs(0, 1)
    for step in range(len(order)):
        parts = [source(order.for_process(part, 2)[step]) for part in (0, 1)]
        assert_same(
            [source(order[step])],
            [RawBatch(*(np.concatenate(pair) for pair in zip(*parts, strict=True)))],
        )


def test_decoder_reads_padding_records_once(dataset, monkeypatch):
    source, read = decoder(dataset), []
    monkeypatch.setattr(
        source, "read_into", lambda *args: read.append(args[0]) or Decoder.read_into(source, *args)
    )
    batch = source(BatchOrder.single_pass(np.array([4, 9]), 7)[0])
    assert read == [4, 9] and np.array_equal(batch.weight, [1, 1, 0, 0, 0, 0, 0])
    assert all(np.array_equal(batch.image[row], batch.image[row % 2]) for row in range(7))


def test_prepare_is_traced_once_for_all_batches(dataset, placement):
    @jax.jit
    @chex.assert_max_traces(1)
    def step(batch, epoch):
        augment = AugmentConfig(crop=8)
        return prepare(batch, seed=SEED, epoch=epoch, augment=augment, input=INPUT, train=True)

    with ResidentBatches.load(decoder(dataset), placement) as resident:
        for i, batch in enumerate(resident.batches(epochs(0, 2))):
            assert np.isfinite(step(batch, i // STEPS)).all()


@pytest.mark.parametrize(("normalize", "group"), [("site", SITE), ("plate", PLATE)])
def test_normalized_pixels_have_mean_0_and_std_1(dataset, normalize, group):
    sites = describe_sites(dataset, dataclasses.replace(INPUT, normalize=normalize))
    images, _ = dataset.read(np.arange(SITES))
    normalized = (images - sites.shift[:, None, None]) * sites.scale[:, None, None]
    for name in dataset.column(group).unique():
        pixels = normalized[dataset.column(group) == name].reshape(-1, 2)
        np.testing.assert_allclose(pixels.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(pixels.std(0), 1, rtol=1e-4)


def test_dtype_normalization_divides_by_the_maximum_integer(dataset):
    sites = describe_sites(dataset, InputConfig(normalize="dtype"))
    assert (sites.shift == 0).all()
    np.testing.assert_allclose(sites.scale, 1 / 65535, rtol=1e-6)


def test_log_plate_adds_a_copy_relative_to_the_plate(dataset, placement):
    input = InputConfig(normalize="log_plate")
    sites = describe_sites(dataset, input)
    assert sites.shift.shape[1] == count_input_channels(dataset, input) == 4
    everything = BatchOrder.single_pass(np.arange(SITES), SITES)
    raw = jax.tree.map(jnp.asarray, decoder(dataset, input)(everything[0]))
    augment = AugmentConfig(crop=16)
    twice = prepare(raw, seed=0, epoch=0, augment=augment, input=input, train=False)[..., 1:]
    log = InputConfig(normalize="log")
    raw = jax.tree.map(jnp.asarray, decoder(dataset, log)(everything[0]))
    once = prepare(raw, seed=0, epoch=0, augment=augment, input=log, train=False)[..., 1:]
    chex.assert_trees_all_close(twice[..., :2], once, rtol=1e-5)
    gap = np.asarray(twice[..., 2:] - once)  # constant for each plate and channel
    plates = dataset.column(PLATE).to_numpy()
    assert gap.std(axis=(1, 2)).max() < 1e-4
    for plate in np.unique(plates):
        assert gap[plates == plate].std(axis=(0, 1, 2)).max() < 1e-4
    brightness = np.asarray(twice[..., 2:]).mean(axis=(1, 2, 3))
    assert abs(brightness).max() < 0.1 < np.ptp(np.asarray(once).mean(axis=(1, 2, 3)))


def test_describe_sites_reads_any_label_column_and_marks_unknown_classes(dataset):
    moa = describe_sites(dataset, InputConfig(label_column="Metadata_moa"))
    assert moa.class_names == ("moa0", "moa1")
    assert np.array_equal(moa.labels, np.arange(SITES) % 2)
    known = describe_sites(dataset, INPUT, ["drug3", "drug0"])
    assert np.array_equal(known.labels[:4], [1, -1, -1, 0])
    with pytest.raises(InputError, match=r"no column 'Metadata_dose'.*Metadata_moa"):
        describe_sites(dataset, InputConfig(label_column="Metadata_dose"))


def test_shuffled_masks_belong_to_other_sites_and_depend_on_the_seed(dataset):
    shuffle = dataclasses.replace(INPUT, mask_use="shuffle")
    first, again, other = (
        describe_sites(dataset, shuffle, seed=seed).mask_of for seed in (0, 0, 1)
    )
    assert (first != np.arange(SITES)).all()
    assert sorted(first) == list(range(SITES))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_large_sites_are_downsampled_to_the_resolution_of_crops(dataset, placement):
    augment = AugmentConfig(
        crop=4, crop_scale=(0.5, 1.0), crop_ratio=(1.0, 1.0)
    )  # crops of at least 13 pixels are resized to 4
    source = decoder(dataset, augment=augment)
    resident = ResidentBatches.load(source, placement)
    assert resident.arrays.image.shape == (SITES, HEIGHT // 4, -(-WIDTH // 4), 2)
    stored = resident.arrays.image.nbytes + resident.arrays.mask.nbytes
    assert stored == resident_bytes(source) < resident_bytes(decoder(dataset)) / 10
    with StreamedBatches(source, placement) as streamed:
        assert_same(list(resident.batches(epochs(0, 1))), list(streamed.batches(epochs(0, 1))))
    record = dataset.record(0)
    blocks = record["image"][:, :16].reshape(5, 4, 4, 4, 2).mean((1, 3))
    np.testing.assert_allclose(resident.arrays.image[0, :, :4], blocks, atol=1)


def test_open_batches_selects_resident_if_memory_suffices(dataset, placement, monkeypatch):
    source = decoder(dataset)
    need = resident_bytes(source)
    monkeypatch.setattr(selection, "_memory_limit", lambda: need)
    assert isinstance(open_batches(source, placement), ResidentBatches)
    monkeypatch.setattr(selection, "_memory_limit", lambda: need - 1)
    assert isinstance(open_batches(source, placement), StreamedBatches)
    assert isinstance(open_batches(source, placement, choice="resident"), ResidentBatches)


def test_resident_batches_free_memory_on_close(dataset, placement):
    with ResidentBatches.load(decoder(dataset), placement) as resident:
        assert not any(array.is_deleted() for array in resident.arrays)
    assert all(array.is_deleted() for array in resident.arrays)
