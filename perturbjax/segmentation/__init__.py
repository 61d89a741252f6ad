"""From pixels to instance masks: networks, tiles and dynamics as jitted functions of arrays, and their weights."""

from perturbjax.segmentation.api import Segmenter, segment

__all__ = ["Segmenter", "segment"]
