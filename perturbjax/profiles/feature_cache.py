"""Cache of extracted features.

Extraction takes minutes, and `classify`, `embed` and `audit` need the same features. A table of
features is therefore stored under the SHA-256 checksum of everything that determines its values:
the dataset's contents, the bytes of the weights, and all settings. Changed data or settings give a
new file; the files used longest ago are deleted.
"""

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
from perturbjax.core.files import delete_oldest, file_digest, make_folder, user_cache
from perturbjax.core.messages import console
from perturbjax.data.cells import CropConfig
from perturbjax.dataset import Dataset
from perturbjax.models import BACKBONES, with_weights
from perturbjax.models.weights import UNTRAINED, resolve_source
from perturbjax.profiles.extract import FeaturesConfig, extract
from perturbjax.profiles.feature_options import Unit
from perturbjax.profiles.image_inputs import AdaptConfig
from perturbjax.profiles.profile_options import SourceConfig

#: Part of every checksum; increased when features of the same data, network and settings change.
FEATURES_VERSION = 2
#: With `pool="stages"`, sites up to this height and width are resized to it: larger inputs add only
#: interpolated pixels, and 128 pixels take a third of the time of 224.
SMALL_SITE = 128
#: Maximum size of the cache; 2,000 sites of three channels take 30 MB with EfficientNet-Lite0.
CACHE_BYTES = 4 << 30


def cached_features(source: SourceConfig, dataset: Dataset) -> Path:
    """Return the table of features of a dataset, extracting it if it is not in the cache.

    Raises:
        InputError: The weights are missing or do not fit the backbone, or the cache cannot be
            written.
    """
    folder = Path(source.feature_cache) if source.feature_cache else user_cache("features")
    unit = choose_unit(source, dataset)
    # The orientation of cells is random, so that their summary averages over views already.
    whole = unit == "site"
    if source.unit == "auto" and not whole:
        console.print(
            f"info: sites of more than {SMALL_SITE} pixels: features are averaged over {unit}s of "
            "native resolution"
        )
    config = FeaturesConfig(
        dataset.paths,
        folder / "features.parquet",
        backbone=source.backbone,
        weights=find_weights(source),
        adapt=AdaptConfig(size=_input_size(source, dataset) if whole else source.size),
        pool=source.pool,
        augmentations=source.augmentations if whole else 1,
        unit=unit,
        aggregate=source.summary,
        crops=CropConfig(max_cells=source.max_cells),
    )
    file = make_folder(folder) / f"{_checksum(config, dataset)}.parquet"
    with _locked(file.with_suffix(".lock")):
        if _is_complete(file, len(dataset)):
            os.utime(file)  # now the most recently used
            console.print(f"info: features of {source.backbone} from the cache: {file}")
        else:
            extract(dataclasses.replace(config, out=file))
            # The new table counts for the size limit but is never deleted here.
            others = (one for one in folder.glob("*.parquet") if one != file)
            delete_oldest(others, CACHE_BYTES - file.stat().st_size)
    return file


def choose_unit(source: SourceConfig, dataset: Dataset) -> Unit:
    """Return the unit of a source; "auto" depends on the size of the sites and on the masks."""
    if source.unit != "auto":
        return source.unit
    if dataset.index[["height", "width"]].to_numpy().max() <= SMALL_SITE:
        return "site"
    # Sites with one cell each are crops of cells.
    return "cell" if dataset.index["n_cells"].mean() > 1 else "tile"


def _input_size(source: SourceConfig, dataset: Dataset) -> int | None:
    """Height and width of the network input in pixels; None for that of the backbone."""
    small = dataset.index[["height", "width"]].to_numpy().max() <= SMALL_SITE
    return SMALL_SITE if source.size is None and source.pool == "stages" and small else source.size


def find_weights(source: SourceConfig) -> str:
    """Return the weights of a source, by default the published ones of its backbone.

    Raises:
        InputError: The backbone is unknown or has no published weights.
    """
    if source.backbone not in with_weights():
        raise InputError(
            f"--backbone {source.backbone}: unknown (available: {', '.join(with_weights())})"
        )
    weights = source.weights or BACKBONES[source.backbone].source
    if not weights:
        raise InputError(
            f"--weights: is required for {source.backbone} (a file, or hf:OWNER/REPOSITORY)"
        )
    return weights


def _checksum(config: FeaturesConfig, dataset: Dataset) -> str:
    weights = config.weights
    settings: dict[str, Any] = {
        "features": FEATURES_VERSION,
        "data": dataset.fingerprint,
        "backbone": config.backbone,
        # The contents of the weight file count, so a changed file gives new features.
        "weights": weights if weights == UNTRAINED else file_digest(resolve_source(weights)[0]),
        "adapt": dataclasses.asdict(config.adapt),
        "pool": config.pool,
        "augmentations": config.augmentations,
        "precision": config.precision,
    }
    if config.unit != "site":  # absent otherwise, so that earlier files of whole sites stay valid
        settings["unit"] = [config.unit, config.aggregate, dataclasses.asdict(config.crops)]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _is_complete(file: Path, rows: int) -> bool:
    """Whether a table exists with all rows; damaged ones are extracted again."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return bool(pq.read_metadata(file).num_rows == rows)
    except (OSError, pa.ArrowException):
        return False


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Let one process at a time extract the same features."""
    with lock.open("w") as file:
        with suppress(OSError):  # network file systems without locks: two processes may extract
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
