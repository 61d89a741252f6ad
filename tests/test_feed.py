"""Both feeds give the same batches, from (seed, epoch, step) alone."""

from __future__ import annotations

import dataclasses
import multiprocessing

import chex
import jax
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbjax import masks
from perturbjax.augment import prepare
from perturbjax.config import AugmentConfig, InputConfig
from perturbjax.console import InputError
from perturbjax.dataset import PLATE, SITE, WELL, SitePixels, open_dataset, write_dataset
from perturbjax.feed import (
    RawBatch,
    ResidentFeed,
    StreamedFeed,
    channels_seen,
    choice,
    choose_feed,
    describe_sites,
    epoch_order,
    fixed_order,
    resident_bytes,
)

SITES, HEIGHT, WIDTH, BATCH, SEED = 37, 20, 18, 8, 5
CHANNELS = ["DNA", "Actin"]
RECORDS = np.arange(3, SITES, dtype=np.int32)  # what one part of a split might be
INPUT = InputConfig(normalize="plate", mask_encoding="distance")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """37 sites of noise with square cells, on three plates of different intensity."""
    random = np.random.default_rng(0)
    sites, rows = [], []
    for n in range(SITES):
        image = random.normal(1000 + 2000 * (n % 3), 100 + n, (HEIGHT, WIDTH, 2)).astype(np.uint16)
        mask = np.kron(random.integers(0, 4, (4, 3)), np.ones((5, 6), int)).astype(np.uint16)
        metadata = {PLATE: f"P{n % 3}", WELL: f"A{n % 5:02d}", SITE: str(n), "Metadata_moa": f"moa{n % 2}"}
        sites.append(SitePixels(image, mask))
        rows.append({"site_id": f"s{n}", **metadata, "Metadata_pert_iname": f"drug{n % 4}"})
    folder = write_dataset(
        tmp_path_factory.mktemp("feed"),
        pd.DataFrame(rows),
        sites,
        channel_names=CHANNELS,
        image_dtype=np.uint16,
        label_column="Metadata_pert_iname",
    )
    return open_dataset(folder)


def streamed(dataset, input=INPUT, **options):
    return StreamedFeed(
        dataset,
        describe_sites(dataset, input, seed=SEED),
        input,
        **{"records": RECORDS, "batch_size": BATCH, "seed": SEED} | options,
    )


def resident_epoch(feed, epoch):
    return list(feed.batches(*epoch_order(SEED, epoch, RECORDS, BATCH)))


def assert_same(first: list[RawBatch], second: list[RawBatch]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        for name, a, b in zip(RawBatch._fields, one, other, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            assert np.array_equal(a, b), name


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5), st.integers(0, 2**31))
def test_an_epoch_visits_each_record_exactly_once(n, batch_size, epoch, seed):
    records = np.random.default_rng(n).choice(1000, n, replace=False)
    indices, weight = epoch_order(seed, epoch, records, batch_size)
    assert indices.shape == weight.shape == (-(-n // batch_size), batch_size)
    assert sorted(indices[weight == 1]) == sorted(records)
    assert set(indices.ravel()) <= set(records)
    again, _ = epoch_order(seed, epoch, records, batch_size)
    assert np.array_equal(indices, again)


def test_epochs_and_seeds_differ_in_order():
    first, other_epoch, other_seed = (epoch_order(s, e, RECORDS, 8)[0] for s, e in ((0, 0), (0, 1), (1, 0)))
    assert not np.array_equal(first, other_epoch)
    assert not np.array_equal(first, other_seed)


def test_only_the_end_is_padded_and_evaluation_keeps_its_order():
    indices, weight = fixed_order(np.arange(10), 4)
    assert np.array_equal(indices.ravel()[:10], np.arange(10))
    assert np.array_equal(weight.ravel(), [1] * 10 + [0] * 2)


@pytest.mark.parametrize("mask_use", ["keep", "shuffle"])
def test_resident_and_streamed_batches_are_the_same_bytes(dataset, mask_use):
    input = dataclasses.replace(INPUT, mask_use=mask_use)
    resident = ResidentFeed(dataset, describe_sites(dataset, input, seed=SEED), input)
    with streamed(dataset, input) as stream:
        for epoch in (0, 1):
            assert_same(resident_epoch(resident, epoch), list(stream.epoch(epoch)))


def test_batches_hold_what_the_dataset_holds(dataset):
    sites = describe_sites(dataset, INPUT)
    with streamed(dataset) as stream:
        batch = next(stream.epoch(0))
    for row, position in enumerate(np.asarray(batch.record)):
        record = dataset.record(position)
        assert np.array_equal(batch.image[row], record["image"])
        assert np.array_equal(batch.mask[row], masks.encode(record["mask"], "distance"))
        assert sites.class_names[batch.label[row]] == f"drug{position % 4}"


def test_a_stream_goes_on_from_any_step(dataset):
    resident = ResidentFeed(dataset, describe_sites(dataset, INPUT), INPUT)
    with streamed(dataset) as stream:
        assert_same(resident_epoch(resident, 4)[3:], list(stream.epoch(4, start_step=3)))
        interrupted = stream.epoch(7)
        next(interrupted), next(interrupted)
        assert_same(resident_epoch(resident, 7)[2:], list(stream.epoch(7, start_step=2)))
        assert_same(resident_epoch(resident, 8), list(stream.epoch(8)))
        assert_same(resident_epoch(resident, 8), list(stream.epoch(8)))  # and back to what it has given before


def test_worker_processes_give_the_same_and_end_when_closed(dataset):
    resident = ResidentFeed(dataset, describe_sites(dataset, INPUT), INPUT)
    with streamed(dataset, workers=2) as stream:
        for epoch in (0, 1):
            assert_same(resident_epoch(resident, epoch), list(stream.epoch(epoch)))
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()


def test_parts_of_several_processes_make_up_the_batch(dataset):
    with (
        streamed(dataset) as whole,
        streamed(dataset, shard=(0, 2)) as first,
        streamed(dataset, shard=(1, 2)) as second,
    ):
        for batch, *parts in zip(whole.epoch(0), first.epoch(0), second.epoch(0), strict=True):
            joined = RawBatch(*(np.concatenate(pair) for pair in zip(*parts, strict=True)))
            assert_same([batch], [joined])
    with pytest.raises(InputError, match="multiple of the 3 processes"):
        streamed(dataset, shard=(0, 3))


def test_the_step_is_traced_once_for_all_batches(dataset):
    @jax.jit
    @chex.assert_max_traces(1)
    def step(batch, epoch):
        augment = AugmentConfig(crop=8)
        return prepare(batch, seed=SEED, epoch=epoch, augment=augment, input=INPUT, train=True)

    resident = ResidentFeed(dataset, describe_sites(dataset, INPUT), INPUT)
    for epoch in range(2):
        for batch in resident_epoch(resident, epoch):
            assert np.isfinite(step(batch, epoch)).all()


@pytest.mark.parametrize(("normalize", "group"), [("site", SITE), ("plate", PLATE)])
def test_normalized_pixels_have_mean_0_and_deviation_1(dataset, normalize, group):
    sites = describe_sites(dataset, dataclasses.replace(INPUT, normalize=normalize))
    images, _ = dataset.read(np.arange(SITES))
    seen = (images - sites.shift[:, None, None]) * sites.scale[:, None, None]
    for name in dataset.column(group).unique():
        pixels = seen[dataset.column(group) == name].reshape(-1, 2)
        np.testing.assert_allclose(pixels.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(pixels.std(0), 1, rtol=1e-4)


def test_dtype_normalization_divides_by_the_largest_integer(dataset):
    sites = describe_sites(dataset, InputConfig(normalize="dtype"))
    assert (sites.shift == 0).all()
    np.testing.assert_allclose(sites.scale, 1 / 65535, rtol=1e-6)


def test_log_plate_gives_every_channel_as_it_is_and_relative_to_its_plate(dataset):
    input = InputConfig(normalize="log_plate")
    sites = describe_sites(dataset, input)
    assert sites.shift.shape[1] == channels_seen(dataset, input) == 4
    raw = next(ResidentFeed(dataset, sites, input).batches(*fixed_order(np.arange(SITES), SITES)))
    still = AugmentConfig(crop=16)
    twice = prepare(raw, seed=0, epoch=0, augment=still, input=input, train=False)[..., 1:]
    log = InputConfig(normalize="log")
    raw = next(ResidentFeed(dataset, describe_sites(dataset, log), log).batches(*fixed_order(np.arange(SITES), SITES)))
    once = prepare(raw, seed=0, epoch=0, augment=still, input=log, train=False)[..., 1:]
    chex.assert_trees_all_close(twice[..., :2], once, rtol=1e-5)
    gap = np.asarray(twice[..., 2:] - once)  # the plate's own level: one number a plate and channel
    plates = dataset.column(PLATE).to_numpy()
    assert gap.std(axis=(1, 2)).max() < 1e-4
    for plate in np.unique(plates):
        assert gap[plates == plate].std(axis=(0, 1, 2)).max() < 1e-4
    brightness = np.asarray(twice[..., 2:]).mean(axis=(1, 2, 3))
    assert abs(brightness).max() < 0.1 < np.ptp(np.asarray(once).mean(axis=(1, 2, 3)))


def test_any_column_can_be_the_label_and_unknown_classes_are_marked(dataset):
    moa = describe_sites(dataset, InputConfig(label_column="Metadata_moa"))
    assert moa.class_names == ("moa0", "moa1")
    assert np.array_equal(moa.labels, np.arange(SITES) % 2)
    known = describe_sites(dataset, INPUT, ["drug3", "drug0"])
    assert np.array_equal(known.labels[:4], [1, -1, -1, 0])
    with pytest.raises(InputError, match=r"no column 'Metadata_dose'.*Metadata_moa"):
        describe_sites(dataset, InputConfig(label_column="Metadata_dose"))


def test_shuffled_masks_are_all_another_sites_and_the_seed_decides(dataset):
    shuffle = dataclasses.replace(INPUT, mask_use="shuffle")
    first, again, other = (describe_sites(dataset, shuffle, seed=seed).mask_of for seed in (0, 0, 1))
    assert (first != np.arange(SITES)).all()
    assert sorted(first) == list(range(SITES))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_large_sites_are_stored_at_the_resolution_that_crops_can_use(dataset):
    augment = AugmentConfig(crop=4, crop_scale=(0.5, 1.0), crop_ratio=(1.0, 1.0))  # 13 pixels and more shrink to 4
    sites = describe_sites(dataset, INPUT)
    resident = ResidentFeed(dataset, sites, INPUT, augment=augment)
    assert resident.arrays.image.shape == (SITES, HEIGHT // 4, -(-WIDTH // 4), 2)
    held = resident.arrays.image.nbytes + resident.arrays.mask.nbytes
    assert held == resident_bytes(dataset, INPUT, augment) < resident_bytes(dataset, INPUT) / 10
    with streamed(dataset, augment=augment) as stream:
        assert_same(resident_epoch(resident, 0), list(stream.epoch(0)))
    record = dataset.record(0)
    blocks = record["image"][:, :16].reshape(5, 4, 4, 4, 2).mean((1, 3))
    np.testing.assert_allclose(resident.arrays.image[0, :, :4], blocks, atol=1)


def test_the_feed_follows_from_what_fits(dataset, monkeypatch):
    need = resident_bytes(dataset, INPUT)
    monkeypatch.setattr(choice, "_room", lambda: need)
    assert choose_feed(dataset, INPUT) == "resident"
    monkeypatch.setattr(choice, "_room", lambda: need - 1)
    assert choose_feed(dataset, INPUT) == "streamed"
    assert choose_feed(dataset, INPUT, "resident") == "resident"


def test_a_closed_resident_feed_frees_its_memory(dataset):
    resident = ResidentFeed(dataset, describe_sites(dataset, INPUT), INPUT)
    resident.close()
    assert all(array.is_deleted() for array in resident.arrays)
