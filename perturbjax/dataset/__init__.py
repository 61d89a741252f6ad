"""A prepared dataset on disk: its schema, its one writer, and its one opener.

A dataset directory is one TFDS dataset (`dataset_info.json`, `features.json`, ArrayRecord shards), plus
`index.parquet` (all metadata in record order, so that nothing decodes images to read labels) and
`provenance.json` (how it was made, and the digest of every file). Neither writing nor reading needs TensorFlow.
"""

from perturbjax.core.plates import PLATE, SITE, WELL
from perturbjax.dataset.reader import Dataset, PixelStore, SiteDataset, SiteSource, open_dataset
from perturbjax.dataset.schema import (
    INDEX,
    INDEX_COLUMNS,
    LARGEST_SITE,
    PROVENANCE,
    SCHEMA_VERSION,
    SOURCE_DIGEST,
    SPLIT,
    STATISTICS,
    Contents,
    SitePixels,
    site_statistics,
)
from perturbjax.dataset.writer import write_dataset

__all__ = [
    "INDEX",
    "INDEX_COLUMNS",
    "LARGEST_SITE",
    "PLATE",
    "PROVENANCE",
    "SCHEMA_VERSION",
    "SITE",
    "SOURCE_DIGEST",
    "SPLIT",
    "STATISTICS",
    "WELL",
    "Contents",
    "Dataset",
    "PixelStore",
    "SiteDataset",
    "SitePixels",
    "SiteSource",
    "open_dataset",
    "site_statistics",
    "write_dataset",
]
