"""Batches for training and inference: resident on the device, or streamed from disk with grain.

Both pipelines give the same batches for the same `BatchOrder`. The order of an epoch depends on
(seed, epoch) only, and the augmentation of a record depends on (seed, epoch, record) only (see
`perturbjax.data.augmentation`). Pipelines therefore have no state, and training resumes at any step
without any data but the step number.

Resident epochs: if the decoded dataset fits on the device, it is copied there once. The training
loop then runs a whole epoch as one device call (`lax.scan` over steps). Each step gathers its
records by index (`gather`) and augments them, so that the host transfers only record numbers.
"""

from perturbjax.data.augmentation import RawBatch
from perturbjax.data.batches.decoder import Decoder
from perturbjax.data.batches.order import (
    BatchOrder,
    BatchRecords,
    shuffle_epoch,
    split_into_batches,
)
from perturbjax.data.batches.protocol import BatchPipeline, Devices, ResidentArrays
from perturbjax.data.batches.resident import ResidentBatches, gather
from perturbjax.data.batches.selection import PipelineChoice, open_batches, resident_bytes
from perturbjax.data.batches.sites import Sites, describe_sites
from perturbjax.data.batches.streamed import StreamedBatches

__all__ = [
    "BatchOrder",
    "BatchPipeline",
    "BatchRecords",
    "Decoder",
    "Devices",
    "PipelineChoice",
    "RawBatch",
    "ResidentArrays",
    "ResidentBatches",
    "Sites",
    "StreamedBatches",
    "describe_sites",
    "gather",
    "open_batches",
    "resident_bytes",
    "shuffle_epoch",
    "split_into_batches",
]
