"""From pixels to instance masks: networks, tiles and dynamics as jitted functions of arrays, and their weights."""
