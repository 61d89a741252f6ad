"""Simulated plates with ground truth, written as 16-bit TIFF files and load_data.csv."""

from data_prep.simulate.plate import SimulateConfig, simulate

__all__ = ["SimulateConfig", "simulate"]
