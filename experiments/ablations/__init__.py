"""Ablations of `experiments.ablation`: variants, command, cost and result."""
