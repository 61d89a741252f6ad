"""Plates whose truth is known, written as real plates are: 16-bit TIFFs and load_data.csv."""

from data_prep.simulate.plate import SimulateConfig, simulate

__all__ = ["SimulateConfig", "simulate"]
