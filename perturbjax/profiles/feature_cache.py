"""Features of a dataset's sites, extracted once and kept under the digest of all that they follow from."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from perturbjax.core.errors import InputError
from perturbjax.core.files import drop_oldest, file_digest, make_folder, user_cache
from perturbjax.core.messages import console
from perturbjax.dataset import Dataset
from perturbjax.models import BACKBONES, with_weights
from perturbjax.models.weights import UNTRAINED, locate
from perturbjax.profiles.extract import FeaturesConfig, extract
from perturbjax.profiles.image_inputs import AdaptConfig
from perturbjax.profiles.profile_options import SourceConfig

#: Part of every key: raised when features of the same data, network and settings change.
FEATURES_VERSION = 2
#: Sites up to this side are seen at it: early stages gain nothing from what was interpolated, and it takes a third of
#: the time that 224 pixels take.
SMALL = 128
#: Images a step, each channel of a site one: more are no faster on CPUs, and take gigabytes.
BATCH_IMAGES = 32
#: Bytes the cache may hold; 2,000 sites of three channels take 30 MB with EfficientNet-Lite0.
CACHE_BYTES = 4 << 30


def kept_features(source: SourceConfig, dataset: Dataset) -> Path:
    """The table of features of every site of a dataset, from the cache or else extracted into it.

    Raises:
        InputError: the weights cannot be had or are not the backbone's, or the cache cannot be written.
    """
    folder = Path(source.feature_cache) if source.feature_cache else user_cache("features")
    config = FeaturesConfig(
        dataset.paths,
        folder / "features.parquet",
        backbone=source.backbone,
        weights=weights_of(source),
        adapt=AdaptConfig(size=_side(source, dataset)),
        pool=source.pool,
        augmentations=source.augmentations,
        batch_size=max(1, BATCH_IMAGES // len(dataset.channel_names)),
    )
    file = make_folder(folder) / f"{_key(config, dataset)}.parquet"
    with _alone(file.with_suffix(".lock")):
        if _holds(file, len(dataset)):
            os.utime(file)  # used now: dropped last
            console.print(f"features: {source.backbone}, as kept in {file}")
        else:
            extract(dataclasses.replace(config, out=file))
            drop_oldest(
                (one for one in folder.glob("*.parquet") if one != file),
                CACHE_BYTES - file.stat().st_size,
            )
    return file


def _side(source: SourceConfig, dataset: Dataset) -> int | None:
    """Pixels at which a site is seen; None leaves it to the backbone."""
    if (
        source.size is None
        and source.pool == "stages"
        and dataset.index[["height", "width"]].to_numpy().max() <= SMALL
    ):
        return SMALL
    return source.size


def weights_of(source: SourceConfig) -> str:
    """The weights asked for, or else those that the backbone's record names: of an installed package, or of the hub.

    Raises:
        InputError: there is no such backbone, or nobody publishes weights for it.
    """
    if source.backbone not in with_weights():
        raise InputError(
            f"--backbone {source.backbone}: unknown; choose one of {', '.join(with_weights())}"
        )
    weights = source.weights or BACKBONES[source.backbone].source
    if not weights:
        raise InputError(
            f"--weights: is required for {source.backbone} (a file, or hf:OWNER/REPOSITORY)"
        )
    return weights


def _key(config: FeaturesConfig, dataset: Dataset) -> str:
    """SHA-256 of the dataset's contents, the weights' bytes, and every setting that decides a feature's value."""
    described: dict[str, Any] = {
        "features": FEATURES_VERSION,
        "data": dataset.fingerprint,
        "backbone": config.backbone,
        "weights": UNTRAINED
        if config.weights == UNTRAINED
        else file_digest(locate(config.weights)[0]),
        "adapt": dataclasses.asdict(config.adapt),
        "pool": config.pool,
        "augmentations": config.augmentations,
        "precision": config.precision,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _holds(file: Path, rows: int) -> bool:
    """Whether a table is there, whole; one that is damaged is made anew."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return bool(pq.read_metadata(file).num_rows == rows)
    except (OSError, pa.ArrowException):
        return False


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Let one process at a time make or find what the lock stands for; the next one finds it made."""
    with lock.open("w") as file:
        with suppress(
            OSError
        ):  # some network filesystems have no locks; then two may extract the same
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
