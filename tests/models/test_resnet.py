"""Residual networks match PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published import features_and_logits, resnet, tensors_of

from perturbjax.models.layers import Mode
from perturbjax.models.resnet import BasicBlock, ResNet
from perturbjax.models.weights import build_from_tensors

forward = nnx.jit(lambda model, x: model(x, Mode()))


def relative(ours, theirs) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(
    ("name", "size", "width"),
    [
        ("resnet18", (64, 64), 512),
        ("resnet18", (65, 71), 512),
        ("resnet34", (33, 48), 512),
        ("resnet50", (65, 64), 2048),
    ],
)
def test_features_and_logits_match_pytorch(name, size, width):
    theirs = resnet(name)
    ours, _ = build_from_tensors(name, tensors_of(theirs), "random")
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    features, logits = features_and_logits(theirs, x)
    outputs = forward(ours, x)
    assert outputs.features.shape == (2, width)
    assert relative(outputs.features, features) < 1e-4
    assert relative(outputs.logits, logits) < 1e-4


def test_stage_maps_match_pytorch():
    import torch

    theirs = resnet("resnet18")
    ours, _ = build_from_tensors("resnet18", tensors_of(theirs), "random")
    x = np.random.default_rng(1).normal(size=(1, 49, 50, 3)).astype(np.float32)
    with torch.no_grad():
        batch = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        hidden = theirs.resnet(batch, output_hidden_states=True).hidden_states
    maps = ours.stage_maps(jnp.asarray(x), Mode())
    assert ours.stage_widths == tuple(stage_map.shape[-1] for stage_map in maps)
    for number, (stage_map, expected) in enumerate(zip(maps, hidden[1:], strict=True)):
        assert relative(stage_map, expected.numpy().transpose(0, 2, 3, 1)) < 1e-4, (
            f"after stage {number + 1}"
        )


@pytest.mark.slow
def test_resnet_trains_on_mask_and_image():
    model = ResNet(
        stage_sizes=(1, 1, 1, 1),
        block=BasicBlock,
        classes=3,
        channels=1,
        dropout=0.5,
        rngs=nnx.Rngs(0),
    )
    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 2))
    labels = jnp.array([0, 1, 2, 0])

    @nnx.jit
    def loss_and_gradient(model):
        def loss(model):
            logits = model(x, Mode(train=True, keys=jax.random.split(jax.random.key(1), 4))).logits
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

        return nnx.value_and_grad(loss)(model)

    before, gradient = loss_and_gradient(model)
    nnx.update(
        model, jax.tree.map(lambda p, g: p - 0.05 * g, nnx.state(model, nnx.Param), gradient)
    )
    after, _ = loss_and_gradient(model)
    assert after < before
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
