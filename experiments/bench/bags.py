"""Time of bags of cells (preset wells) on whole fields: reading, prediction and a training step.

    python -m experiments.bench --only bags --out runs/bench [--quick]

Fields of 1080 x 1080 pixels with five channels, 16 bit, and 144 cells; windows of 112 pixels around
at most 64 cells. `read` decodes a field and cuts out its cells. `predict` and `train` run the
network of the preset on batches that are in memory. The last column extrapolates to a plate of 384
fields.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from skimage.draw import disk

from experiments.bench.tables import Row
from perturbjax.core.config import Recipe, preset
from perturbjax.data.batches import BatchOrder, Decoder, describe_sites
from perturbjax.dataset import PLATE, SITE, WELL, Dataset, SitePixels, open_dataset, write_dataset
from perturbjax.training.optimizer import make_optimizer
from perturbjax.training.phases import create_network
from perturbjax.training.step import (
    initial_state,
    make_predict_step,
    make_train_step,
    split_model,
)

#: Height and width of a field, cells along an axis, channels, window of a cell, and fields of a
#: plate.
SIZE, ACROSS, CHANNELS, WINDOW, PLATE_FIELDS = 1080, 12, 5, 112, 384
LABEL = "Metadata_pert_iname"


def run(quick: bool) -> list[Row]:
    """Measure each stage.

    Returns:
        Rows with `ms_per_field` (median over batches), `spread` (maximum minus minimum) and
        `minutes_per_plate`.
    """
    fields, rounds = (4, 1) if quick else (16, 5)
    recipe = preset("wells")
    input = dataclasses.replace(recipe.input, normalize="log", cell_size=WINDOW)
    optim = dataclasses.replace(recipe.optim, batch_size=fields)
    recipe = dataclasses.replace(recipe, input=input, optim=optim)
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_fields(Path(folder) / "data", fields)
        decoder = Decoder(dataset, describe_sites(dataset, input), input, recipe.augment)
        order = BatchOrder.single_pass(np.arange(fields), fields)
        batch = next(iter(decoder.batches(order)))
        stages: dict[str, Callable[[], object]] = {
            "read": lambda: next(iter(decoder.batches(order))),
            **_network_stages(recipe, dataset, batch),
        }
        return [_measure(name, stage, fields, rounds) for name, stage in stages.items()]


def _measure(name: str, stage: Callable[[], object], fields: int, rounds: int) -> Row:
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(stage())
        times.append((time.perf_counter() - start) / fields)
    # The first round compiles.
    times = times[1:]
    return {
        "stage": name,
        "ms_per_field": 1000 * statistics.median(times),
        "spread": 1000 * (max(times) - min(times)),
        "minutes_per_plate": PLATE_FIELDS * statistics.median(times) / 60,
    }


def _network_stages(
    recipe: Recipe, dataset: Dataset, batch: Any
) -> dict[str, Callable[[], object]]:
    model, _ = create_network(recipe, CHANNELS, ["a", "b"])
    graphdef, params, stats = split_model(model)
    optimizer = make_optimizer(recipe.optim, 100)
    state = initial_state(params, stats, optimizer)
    batch = jax.device_put(batch)
    predict = jax.jit(make_predict_step(graphdef, recipe))
    stages: dict[str, Callable[[], object]] = {
        f"predict {recipe.input.cells} cells": lambda: predict(params, stats, batch)
    }
    for cells in (recipe.input.cells_per_step, recipe.input.cells):
        input = dataclasses.replace(recipe.input, cells_per_step=cells)
        own = dataclasses.replace(recipe, input=input)
        step = jax.jit(make_train_step(graphdef, optimizer, own, steps_per_epoch=100))
        stages[f"train {cells} cells"] = lambda step=step: step(state, batch)
    return stages


def write_fields(path: Path, count: int) -> Dataset:
    """Write fields with noise and a grid of cells."""
    random = np.random.default_rng(0)
    mask = np.zeros((SIZE, SIZE), np.uint16)
    step = SIZE // ACROSS
    for label in range(ACROSS**2):
        center = step // 2 + step * np.array(divmod(label, ACROSS))
        mask[disk(center, 0.25 * step, shape=mask.shape)] = label + 1
    light = np.where(mask > 0, 4000.0, 400.0)[..., None].repeat(CHANNELS, axis=-1)
    sites = (SitePixels(random.poisson(light).astype(np.uint16), mask) for _ in range(count))
    names = [str(number) for number in range(count)]
    table = pd.DataFrame(
        {
            "site_id": names,
            PLATE: "P",
            WELL: "A01",
            SITE: names,
            LABEL: ["ab"[number % 2] for number in range(count)],
        }
    )
    write_dataset(
        path,
        table,
        sites,
        channel_names=[f"C{number}" for number in range(CHANNELS)],
        image_dtype=np.uint16,
        label_column=LABEL,
    )
    return open_dataset(path)
