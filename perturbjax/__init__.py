"""Plates of cell images in, predictions of the treatment out, with an honest account of their worth."""

__version__ = "0.1.0"
