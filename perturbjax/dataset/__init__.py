"""Prepared datasets on disk: schema, writer and reader.

A dataset directory is one TFDS dataset (`dataset_info.json`, `features.json`, ArrayRecord shards)
with two more files: `index.parquet` has all metadata in record order, so that labels are read
without decoding images, and `provenance.json` describes how the dataset was built, with the
checksum of each file. Neither writing nor reading needs TensorFlow.
"""

from perturbjax.core.plates import PLATE, SITE, WELL
from perturbjax.dataset.joined import open_dataset
from perturbjax.dataset.reader import Dataset
from perturbjax.dataset.schema import (
    INDEX,
    INDEX_COLUMNS,
    LARGEST_SITE,
    PIXEL_SIZES,
    PROVENANCE,
    SCHEMA_VERSION,
    SOURCE_DIGEST,
    SPLIT,
    STATISTICS,
    DatasetPlan,
    EqualSites,
    SitePixels,
    SiteSource,
    site_statistics,
)
from perturbjax.dataset.writer import write_dataset

__all__ = [
    "INDEX",
    "INDEX_COLUMNS",
    "LARGEST_SITE",
    "PIXEL_SIZES",
    "PLATE",
    "PROVENANCE",
    "SCHEMA_VERSION",
    "SITE",
    "SOURCE_DIGEST",
    "SPLIT",
    "STATISTICS",
    "WELL",
    "Dataset",
    "DatasetPlan",
    "EqualSites",
    "SitePixels",
    "SiteSource",
    "open_dataset",
    "site_statistics",
    "write_dataset",
]
