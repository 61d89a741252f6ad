"""Two feeds that give the same batches: sites resident on the device, or streamed from disk with grain.

Whoever loops owns the order: a feed is opened once by `open_feed`, and gives the batches of any `Order`. The order of
an epoch follows from (seed, epoch) alone, so a feed has no state: going on from a step needs nothing else.
"""

from perturbjax.augment import RawBatch
from perturbjax.feed.choice import FeedChoice, open_feed, resident_bytes
from perturbjax.feed.contract import Devices, Feed, ResidentArrays
from perturbjax.feed.decode import Decoder
from perturbjax.feed.order import Order, Rows, epoch_order, fixed_order
from perturbjax.feed.resident import ResidentFeed, gather
from perturbjax.feed.sites import Sites, describe_sites
from perturbjax.feed.streamed import StreamedFeed
from perturbjax.normalize import channels_seen

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
    "channels_seen",
    "describe_sites",
    "epoch_order",
    "fixed_order",
    "gather",
    "open_feed",
    "resident_bytes",
]
