"""Features of a frozen backbone, computed once for each site and stored on disk.

The backbone of `--head channels` takes most of the time of training and of prediction, and its
features do not change during training. They are stored in the cache folder of the user
(`perturbjax/site_features`; PERTURBJAX_SITE_FEATURES names another folder, or `none`). So `train`,
`evaluate`, `predict` and the folds of `audit --train` compute each site once. Everything that
determines the values is part of the checksum in the file names: pixels and masks, weights,
normalization, input settings, platform and versions. Each file is a ZIP archive (npz), whose
checksums are verified when it is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int

from perturbjax.core.config import Recipe
from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic, delete_oldest, make_folder, user_cache
from perturbjax.core.memory import release_freed_memory
from perturbjax.core.progress import QUIET_S, track
from perturbjax.data.batches import BatchOrder, Decoder, RawBatch
from perturbjax.models.kernels import onednn
from perturbjax.training.devices import Placement, prepare_step
from perturbjax.training.step import make_masked_features_step, make_site_features_step

#: Part of every checksum; increased when features of the same data and network change.
_VERSION = 1
#: Maximum size of all stored features in bytes.
_CACHE_BYTES = 4 << 30
#: Sites in a device call, by platform: a CPU is not faster with more, and single images are padded
#: to this number.
_BATCH = {"cpu": 8}
_ACCELERATOR_BATCH = 64
#: Number of sites in a stored file: the work that an interruption can lose.
_PART = 256

Batches = Callable[[BatchOrder], Iterable[RawBatch]]


@dataclasses.dataclass(frozen=True)
class SiteFeatureStore:
    """Stored features of the sites of one dataset, for one backbone and input.

    Attributes:
        folder: folder of all stored features.
        key: checksum of everything that determines the values.
    """

    folder: Path
    key: str

    def read(self, wanted: set[int]) -> dict[int, Float32[np.ndarray, " d"]]:
        """Return the stored features of the wanted positions; damaged files are ignored."""
        stored: dict[int, np.ndarray] = {}
        for file in sorted(self.folder.glob(f"{self.key}-*.npz")):
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    rows = zip(arrays["positions"].tolist(), arrays["features"], strict=True)
                    stored |= {position: row for position, row in rows if position in wanted}
                os.utime(file)  # now the most recently used
            except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
                continue
        return stored

    def of_changes(self, names: Sequence[str], batch_size: int = 0) -> SiteFeatureStore:
        """Return the store of features with changed masks or images.

        Args:
            names: names of the changes, in order.
            batch_size: number of sites in a step, on which the last bits depend; 0 for the constant
                number of `SiteFeatures.compute`.
        """
        settings = json.dumps([self.key, *names, batch_size])
        key = hashlib.sha256(settings.encode()).hexdigest()[:32]
        return dataclasses.replace(self, key=key)

    def write(self, positions: Int[np.ndarray, " n"], features: Float32[np.ndarray, "n d"]) -> None:
        """Store the features of some sites, and delete the oldest files above the size limit."""
        name = hashlib.sha256(np.asarray(positions, np.int64).tobytes()).hexdigest()[:16]
        try:
            file = make_folder(self.folder) / f"{self.key}-{name}.npz"
            with atomic(file) as temporary:
                np.savez(temporary, positions=positions, features=features)
            delete_oldest(self.folder.glob("*.npz"), _CACHE_BYTES)
        except InputError:  # a cache that cannot be written only costs time
            return


def open_store(decoder: Decoder, recipe: Recipe, params: Any) -> SiteFeatureStore | None:
    """Return the store of a dataset's site features; None for images in memory.

    Args:
        decoder: input of the network, with shift and scale of every site.
        recipe: recipe of the run.
        params: parameters of the network.
    """
    fingerprint = getattr(decoder.dataset, "fingerprint", None)
    folder = os.environ.get("PERTURBJAX_SITE_FEATURES") or str(user_cache("site_features"))
    if fingerprint is None or folder == "none":
        return None
    digest = hashlib.sha256(fingerprint.encode())
    settings = {
        "version": _VERSION,
        "input": dataclasses.asdict(recipe.input),
        "crop": recipe.augment.crop,
        "halvings": decoder.halvings,
        "model": dataclasses.asdict(recipe.model),
        "symmetries": recipe.transfer.symmetries,
        "window": recipe.transfer.window,
        "platform": jax.default_backend(),
        "onednn": onednn.is_usable(),
        "versions": [version(name) for name in ("perturbjax", "jax", "jaxlib")],
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    sites = decoder.sites
    for array in (sites.shift, sites.scale, sites.mask_of, *jax.tree.leaves(params["backbone"])):
        digest.update(np.ascontiguousarray(array).tobytes())
    return SiteFeatureStore(Path(folder), digest.hexdigest()[:32])


class SiteFeatures:
    """Computes the unreduced features of sites, see `EnsembleClassifier.compute_features`."""

    def __init__(self, graphdef: Any, recipe: Recipe, placement: Placement):
        """
        Args:
            graphdef: graph definition of the network.
            recipe: recipe of the run.
            placement: devices.
        """
        self._step = placement.compile_predict(make_site_features_step(graphdef, recipe))
        self._masks_step = placement.compile_predict(make_masked_features_step(graphdef, recipe))
        self._placement = placement

    @property
    def step_size(self) -> int:
        """Number of sites in a device call."""
        size = _BATCH.get(jax.default_backend(), _ACCELERATOR_BATCH)
        return size + -size % self._placement.batch_multiple

    def compute(
        self,
        params: Any,
        stats: Any,
        batches: Batches,
        positions: Int[np.ndarray, " n"],
        store: SiteFeatureStore | None = None,
        *,
        changed: bool = False,
    ) -> Float32[np.ndarray, "n d"]:
        """Read the stored features of the records at `positions`, and compute the others.

        The number of sites in a device call is constant, so that a stored value equals a computed
        one to the last bit. If the batches are `changed`, equal positions can have other pixels.
        Their features are computed in the order of `positions`, and stored by row number.
        """
        if changed:
            rows = range(len(positions))
            stored = {} if store is None else store.read(set(rows))
            if len(stored) == len(rows):
                return np.stack([stored[row] for row in rows])
            parts = self._compute_parts(params, stats, batches, positions)
            features = np.concatenate([features for _, features in parts])
            if store is not None:
                store.write(np.array(rows), features)
            return features
        stored = {} if store is None else store.read(set(positions.tolist()))
        wanted = dict.fromkeys(positions.tolist())
        missing = np.array([one for one in wanted if one not in stored], np.int64)
        for part, features in self._compute_parts(params, stats, batches, missing):
            stored |= dict(zip(part.tolist(), features, strict=True))
            if store is not None:
                store.write(part, features)
        return np.stack([stored[one] for one in positions.tolist()])

    def compute_of_masks(
        self,
        params: Any,
        stats: Any,
        pipelines: Sequence[Batches],
        positions: Int[np.ndarray, " n"],
        batch_size: int,
        store: SiteFeatureStore | None = None,
    ) -> Float32[np.ndarray, "m n d"]:
        """Compute the features of records with m different masks; the backbone runs once.

        If the features of all records are stored, they are read instead.

        Args:
            params: parameters of the network.
            stats: statistics of the network.
            pipelines: m batch pipelines of the same images with different masks.
            positions: (n,) positions in the dataset.
            batch_size: number of sites in a step.
            store: store of these masks and this batch size, see `SiteFeatureStore.of_changes`.
        """
        stored = {} if store is None else store.read(set(positions.tolist()))
        if len(positions) and set(positions.tolist()) == set(stored):
            rows = np.stack([stored[one] for one in positions.tolist()])
            return rows.reshape(len(rows), len(pipelines), -1).swapaxes(0, 1)
        features = self._compute_masks(params, stats, pipelines, positions, batch_size)
        if store is not None:
            store.write(positions, features.reshape(len(positions), -1))
        return features.swapaxes(0, 1)

    def _compute_masks(
        self,
        params: Any,
        stats: Any,
        pipelines: Sequence[Batches],
        positions: Int[np.ndarray, " n"],
        batch_size: int,
    ) -> Float32[np.ndarray, "n m d"]:
        order = BatchOrder.single_pass(positions, batch_size)
        rows = []
        batches = zip(*(batches(order) for batches in pipelines), strict=True)
        unit = f"batches of {batch_size} sites"
        label = "Computing features with changed masks"
        tracked = track(batches, total=len(order), label=label, unit=unit, quiet_s=QUIET_S)
        for number, step_batches in enumerate(tracked):
            prepare_step(number, self._masks_step, params, stats, step_batches)
            (features,) = self._masks_step(params, stats, step_batches)
            rows.append(np.asarray(features)[:batch_size])
            release_freed_memory()
        return np.concatenate(rows)[: len(positions)]

    def _compute_parts(
        self, params: Any, stats: Any, batches: Batches, positions: Int[np.ndarray, " n"]
    ) -> Iterator[tuple[Int[np.ndarray, " m"], Float32[np.ndarray, "m d"]]]:
        """Yield positions and features of `_PART` sites at a time."""
        if not len(positions):
            return
        size = self.step_size
        order = BatchOrder.single_pass(positions, size)
        tracked = track(
            batches(order),
            total=len(order),
            label="Computing site features",
            unit=f"batches of {size} sites",
            quiet_s=QUIET_S,
        )
        first, rows = 0, []
        for number, batch in enumerate(tracked):
            prepare_step(number, self._step, params, stats, batch)
            (features,) = self._step(params, stats, batch)
            # Rows after `size` pad the batch for the devices.
            rows.append(np.asarray(features)[:size])
            if len(rows) * size >= _PART or number + 1 == len(order):
                part = positions[first : first + len(rows) * size]
                yield part, np.concatenate(rows)[: len(part)]
                first, rows = first + len(part), []
                # Each part leaves hundreds of megabytes of fragmented free memory.
                release_freed_memory()


def add_features(
    batches: Batches, features: Float32[np.ndarray, "n d"], placement: Placement
) -> Callable[[BatchOrder], Iterator[tuple[RawBatch, Any]]]:
    """Return a batch pipeline that yields each batch with the site features of its rows.

    Args:
        batches: batch pipeline of a single pass over n records.
        features: features of the records, in the order of the pass.
        placement: devices.
    """

    def paired(order: BatchOrder) -> Iterator[tuple[RawBatch, Any]]:
        first = 0
        for number, batch in enumerate(batches(order)):
            # The padding of the last batch repeats the first rows, as in `split_into_batches`.
            rows = np.arange(first, first + len(order[number].positions)) % len(features)
            yield batch, placement.place_rows(features[rows])
            first += len(rows)

    return paired
