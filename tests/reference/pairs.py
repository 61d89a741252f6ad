"""One of the original's networks in PyTorch and here, from the same weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from perturbjax import models
from perturbjax.models import pytorch as exchange
from perturbjax.training.loss import cross_entropy
from reference.original import REFERENCES

CLASSES, SMOOTHING = 5, 0.1

# The references are tiny: threads would cost more than they bring.
torch.set_num_threads(1)


class Pair(NamedTuple):
    """The reference, and our structure, parameters and statistics."""

    name: str
    theirs: torch.nn.Module
    graphdef: Any
    params: Any
    stats: Any

    def network(self, params: Any = None, stats: Any = None) -> nnx.Module:
        """Our network with given parameters and statistics, or with those it was made with."""
        return nnx.merge(self.graphdef, params or self.params, stats or self.stats, copy=True)

    def named(self, params: Any = None, stats: Any = None) -> dict[str, np.ndarray]:
        """Parameters (or their gradients) and statistics under torch's names, in torch's layouts."""
        return exchange.state_dict(self.name, self.network(params, stats))


def make_pair(name: str, folder: Path, *, size: int, channels: int = 1) -> Pair:
    """A reference as if trained (BatchNorm's parameters and statistics away from 1 and 0), carried over in a file."""
    torch.manual_seed(0)
    sized = {"image_size": size} if name in models.FIXED_SIZE_NETWORKS else {}
    theirs = REFERENCES[name](CLASSES, channels=channels, dropout=0.0, **sized)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    torch.save(theirs.state_dict(), folder / "weights.pth")
    got = exchange.import_state_dict(folder / "weights.pth", name)
    assert (got.classes, got.channels) == (CLASSES, channels)
    network = models.create(name, classes=CLASSES, channels=channels, dropout=0.0, seed=0, **sized)
    graphdef = nnx.split(network, nnx.Param, nnx.BatchStat)[0]
    params, stats = jax.tree.map(jnp.asarray, (got.params, got.stats))
    return Pair(name, theirs, graphdef, params, stats)


def batches(
    count: int, batch: int, height: int, width: int, channels: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (count, batch, H, W, 1 + channels) with a binary mask first, and labels (count, batch)."""
    rng = np.random.default_rng(0)
    x = rng.random((count, batch, height, width, 1 + channels), np.float32)
    x[..., 0] = x[..., 0] > 0.4
    return x, rng.integers(0, CLASSES, (count, batch))


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, -3)))


def loss_and_gradients(pair: Pair, dtype: Any) -> Callable[..., Any]:
    """(params, stats, x, labels) → ((loss, new stats), gradients), in training mode, compiled."""

    def loss(params: Any, stats: Any, x: Any, labels: Any) -> tuple[Any, Any]:
        network = pair.network(params, stats)
        total, weight = cross_entropy(
            network(x, models.Mode(train=True, dtype=dtype)).logits, labels, smoothing=SMOOTHING
        )
        return total / weight, nnx.state(network, nnx.BatchStat)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def criterion() -> torch.nn.Module:
    return torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
