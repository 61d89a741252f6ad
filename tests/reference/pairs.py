"""A network of the original in PyTorch and in JAX, with the same weights."""

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

# The networks are tiny; more threads would be slower.
torch.set_num_threads(1)


class Pair(NamedTuple):
    """PyTorch reference, and graph, parameters and statistics of the JAX network."""

    name: str
    theirs: torch.nn.Module
    graphdef: Any
    params: Any
    stats: Any

    def network(self, params: Any = None, stats: Any = None) -> nnx.Module:
        """Return the JAX network with these parameters and statistics, or with its initial ones."""
        return nnx.merge(self.graphdef, params or self.params, stats or self.stats, copy=True)

    def named(self, params: Any = None, stats: Any = None) -> dict[str, np.ndarray]:
        """Return parameters (or gradients) and statistics under PyTorch's names and layouts."""
        return exchange.state_dict(self.name, self.network(params, stats))


def make_pair(name: str, folder: Path, *, size: int, channels: int = 1) -> Pair:
    """Create a reference with BatchNorm values other than 0 and 1, and import it from a file."""
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
    imported = exchange.import_state_dict(folder / "weights.pth", name)
    assert (imported.classes, imported.channels) == (CLASSES, channels)
    network = models.create(name, classes=CLASSES, channels=channels, dropout=0.0, seed=0, **sized)
    graphdef = nnx.split(network, nnx.Param, nnx.BatchStat)[0]
    params, stats = jax.tree.map(jnp.asarray, (imported.params, imported.stats))
    return Pair(name, theirs, graphdef, params, stats)


def batches(
    count: int, batch: int, height: int, width: int, channels: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Create inputs (count, batch, H, W, 1 + channels), binary mask first, and labels."""
    rng = np.random.default_rng(0)
    x = rng.random((count, batch, height, width, 1 + channels), np.float32)
    x[..., 0] = x[..., 0] > 0.4
    return x, rng.integers(0, CLASSES, (count, batch))


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, -3)))


def loss_and_gradients(pair: Pair, dtype: Any) -> Callable[..., Any]:
    """Compile (params, stats, x, labels) → ((loss, new stats), gradients) in training mode."""

    def loss(params: Any, stats: Any, x: Any, labels: Any) -> tuple[Any, Any]:
        network = pair.network(params, stats)
        total, weight = cross_entropy(
            network(x, models.Mode(train=True, dtype=dtype)).logits, labels, smoothing=SMOOTHING
        )
        return total / weight, nnx.state(network, nnx.BatchStat)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def criterion() -> torch.nn.Module:
    return torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
