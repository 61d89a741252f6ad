"""Ablations of `experiments.ablation`: variants, the command, its cost and its result."""
