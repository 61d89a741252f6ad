"""Configurations of `experiments.grid`: what is compared, the command, its cost and its result."""
