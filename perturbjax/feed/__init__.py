"""Two feeds that give the same batches: sites resident on the device, or streamed from disk with grain.

The order of an epoch follows from (seed, epoch) alone, so a feed's whole state is (epoch, step): going on from there
needs nothing else.
"""

from perturbjax.augment import RawBatch
from perturbjax.feed.choice import FeedChoice, choose_feed, resident_bytes
from perturbjax.feed.order import epoch_order, fixed_order
from perturbjax.feed.resident import ResidentArrays, ResidentFeed, gather
from perturbjax.feed.sites import Sites, describe_sites
from perturbjax.feed.streamed import StreamedFeed
from perturbjax.normalize import channels_seen

__all__ = [
    "FeedChoice",
    "RawBatch",
    "ResidentArrays",
    "ResidentFeed",
    "Sites",
    "StreamedFeed",
    "channels_seen",
    "choose_feed",
    "describe_sites",
    "epoch_order",
    "fixed_order",
    "gather",
    "resident_bytes",
]
