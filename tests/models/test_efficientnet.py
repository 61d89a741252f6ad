"""EfficientNets match PyTorch's for every padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from published import efficientnet, features_and_logits, tensors_of

from perturbjax.models.efficientnet import EfficientNet, InvertedResidual, _shifted_sum, pad
from perturbjax.models.layers import Mode, conv2d
from perturbjax.models.weights import build_from_tensors

pytestmark = pytest.mark.full

forward = nnx.jit(lambda model, x: model(x, Mode()))


@pytest.mark.parametrize(
    ("name", "size", "padding", "image_size"),
    [
        ("efficientnet_b0", (64, 64), "same", None),
        ("efficientnet_b0", (65, 71), "same", None),
        ("efficientnet_lite0", (63, 64), "same", None),
        ("efficientnet_lite0", (63, 64), "static", 224),
        ("efficientnet_lite2", (63, 64), "same", None),
    ],
)
def test_features_and_logits_match_pytorch(name, size, padding, image_size):
    theirs = efficientnet(name, image_size=image_size)
    ours, variant = build_from_tensors(name, tensors_of(theirs), "random", padding=padding)
    assert (variant["padding"], variant["epsilon"]) == (padding, 1e-3)
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    features, logits = features_and_logits(theirs, x)
    outputs = forward(ours, x)
    np.testing.assert_allclose(outputs.features, features, atol=1e-4 * np.abs(features).max())
    np.testing.assert_allclose(outputs.logits, logits, atol=1e-4 * np.abs(logits).max())


@pytest.mark.parametrize("padding", ["symmetric", "same", "static"])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 2)])
def test_shifted_sum_matches_depthwise_convolution(size, stride, padding):
    x = np.random.default_rng(0).normal(size=(2, 13, 10, 4)).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(size, size, 1, 4)).astype(np.float32)
    padded = pad(jnp.asarray(x), size, stride, padding)
    np.testing.assert_allclose(
        _shifted_sum(padded, jnp.asarray(kernel), stride),
        conv2d(padded, jnp.asarray(kernel), stride=stride, groups=4),
        atol=1e-5,
    )


def test_symmetric_padding_matches_torch():
    x = np.random.default_rng(0).normal(size=(1, 11, 8, 3)).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(5, 5, 3, 2)).astype(np.float32)
    ours = conv2d(pad(jnp.asarray(x), 5, 2, "symmetric"), jnp.asarray(kernel), stride=2)
    batch, weight = (
        torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
        torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()),
    )
    theirs = (
        torch.nn.functional.conv2d(batch, weight, stride=2, padding=2).numpy().transpose(0, 2, 3, 1)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_inverted_residual_has_gradients_for_all_parameters():
    block = InvertedResidual(
        8, 8, 3, stride=1, expansion=6, lite=False, padding="same", epsilon=1e-3, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (4, 9, 9, 8))
    gradient = nnx.jit(nnx.grad(lambda block: (block(x, Mode(train=True)) ** 3).sum()))(block)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))


def test_evaluation_uses_float32_on_cpu_and_bfloat16_on_gpu():
    model = EfficientNet(lite=True, classes=2, inputs=3, rngs=nnx.Rngs(0))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    x, half = jax.random.normal(jax.random.key(0), (2, 32, 32, 3)), Mode(dtype=jnp.bfloat16)

    def maps(x, mode):
        return nnx.merge(graphdef, params, stats, copy=True).feature_map(x, mode)

    compute = jax.jit(lambda x: maps(x, half))
    np.testing.assert_allclose(
        compute(x), jax.jit(lambda x: maps(x, Mode()))(x), rtol=1e-5, atol=1e-5
    )
    for platform, wide in (("cpu", True), ("cuda", False)):
        text = compute.trace(x).lower(lowering_platforms=(platform,)).as_text()
        products = [line for line in text.splitlines() if "stablehlo.convolution" in line]
        assert products and all(("xbf16>" not in line) == wide for line in products)
    trained = jax.eval_shape(lambda x: maps(x, Mode(train=True, dtype=jnp.bfloat16)), x)
    assert trained.dtype == jnp.bfloat16
