"""Configurations of `experiments.grid`: recipes, command, cost and result."""
