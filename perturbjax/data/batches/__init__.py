"""Two feeds that give the same batches: sites resident on the device, or streamed from disk with grain.

Whoever loops owns the order: a feed is opened once by `open_feed`, and gives the batches of any `Order`. The order of
an epoch follows from (seed, epoch) alone, so a feed has no state: going on from a step needs nothing else.
"""

from perturbjax.data.augmentation import RawBatch
from perturbjax.data.batches.decoder import Decoder
from perturbjax.data.batches.order import Order, Rows, epoch_order, fixed_order
from perturbjax.data.batches.protocol import Devices, Feed, ResidentArrays
from perturbjax.data.batches.resident import ResidentFeed, gather
from perturbjax.data.batches.selection import FeedChoice, open_feed, resident_bytes
from perturbjax.data.batches.sites import Sites, describe_sites
from perturbjax.data.batches.streamed import StreamedFeed

__all__ = [
    "Decoder",
    "Devices",
    "Feed",
    "FeedChoice",
    "Order",
    "RawBatch",
    "ResidentArrays",
    "ResidentFeed",
    "Rows",
    "Sites",
    "StreamedFeed",
    "describe_sites",
    "epoch_order",
    "fixed_order",
    "gather",
    "open_feed",
    "resident_bytes",
]
