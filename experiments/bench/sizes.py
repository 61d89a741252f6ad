"""Sizes of the paper's training, shared by the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

from perturbjax.core.config import AugmentConfig, ModelConfig, OptimConfig, Recipe


@dataclass(frozen=True)
class Size:
    """Sizes of dataset and training; the defaults are those of the paper."""

    sites: int = 2867
    train: int = 2294
    stored: int = 270
    crop: int = 128
    batch: int = 128
    epochs: int = 200
    classes: int = 302
    evaluate_every: int = 10

    @property
    def steps(self) -> int:
        return -(-self.train // self.batch)

    def recipe(self, precision: str) -> Recipe:
        return Recipe(
            model=ModelConfig(precision=precision),
            augment=AugmentConfig(crop=self.crop),
            optim=OptimConfig(epochs=self.epochs, batch_size=self.batch),
        )
