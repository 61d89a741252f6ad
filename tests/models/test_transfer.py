"""Two-phase training: frozen parameters keep every bit; rates differ per layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from perturbjax.core.config import OptimConfig, TransferConfig
from perturbjax.models import Mode
from perturbjax.models.resnet import RESNET18, BasicBlock, ResNet
from perturbjax.models.transfer import TransferClassifier, rate_scales, scale_updates, set_phase
from perturbjax.training.optimizer import make_optimizer

pytestmark = pytest.mark.full


def small(head: str, channels: int = 1) -> TransferClassifier:
    backbone = ResNet(
        stage_sizes=(1, 1, 1, 1), block=BasicBlock, classes=4, inputs=3, rngs=nnx.Rngs(0)
    )
    return TransferClassifier(
        backbone, head=head, classes=3, channels=channels, dropout=0.1, rngs=nnx.Rngs(1)
    )


def leaves(tree) -> dict[str, np.ndarray]:
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in paths_and_leaves
    }


def one_step(model, phase, transfer, optim=OptimConfig(weight_decay=0.1, decoupled=False)):  # noqa: B008
    """Return parameters and statistics before and after a training step with weight decay."""
    graphdef, params, stats = nnx.split(set_phase(model, phase), nnx.Param, nnx.BatchStat)
    optimizer = scale_updates(
        make_optimizer(optim, 10), rate_scales(params, phase, transfer, RESNET18)
    )
    x = jax.random.uniform(jax.random.key(0), (4, 40, 40, 2))
    labels = jnp.array([0, 1, 2, 0])

    @jax.jit
    def step(params, stats, opt_state):
        def loss(params):
            model = nnx.merge(graphdef, params, stats, copy=True)
            logits = model(x, Mode(train=True, keys=jax.random.split(jax.random.key(1), 4))).logits
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, nnx.state(model, nnx.BatchStat)

        gradients, stats_after = jax.grad(loss, has_aux=True)(params)
        updates, _ = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), stats_after

    after = step(params, stats, optimizer.init(params))
    return leaves((params, stats)), leaves(after)


@pytest.mark.parametrize("head", ["dense", "attention"])
def test_phase_1_keeps_backbone_bit_identical_and_trains_new_layers(head):
    model = small(head)
    kernel = model.backbone.stem.conv.kernel
    kernel[...] = (
        kernel[...].at[0, 0, 0, :2].set(jnp.array([-0.0, 0.0]))
    )  # signed zeros differ in a bit
    before, after = one_step(model, "new layers", TransferConfig(head=head))
    backbone = [name for name in before if "backbone" in name]
    assert len(backbone) > 40
    for name, value in before.items():
        same = value.tobytes() == after[name].tobytes()
        assert same == (name in backbone), name


def test_phase_2_trains_all_layers_and_backbone_at_lower_rate():
    transfer = TransferConfig(finetune_rate=0.1, layer_decay=0.5)
    before, after = one_step(small("dense"), "all layers", transfer)
    assert all(value.tobytes() != after[name].tobytes() for name, value in before.items())
    # Adam's first step equals the learning rate for any gradient, so its factor is visible.
    change = {name: np.abs(after[name] - value).max() for name, value in before.items()}
    full = change["0/head/kernel/value"]
    for layer, factor in (
        ("stages/3/0/layers/1/conv", 0.1),
        ("stages/0/0/layers/0/conv", 0.1 / 8),
        ("stem/conv", 0.1 / 16),
    ):
        assert change[f"0/backbone/{layer}/kernel/value"] / full == pytest.approx(factor, rel=1e-2)


def test_rate_scales_freeze_backbone_in_phase_1_only():
    _, params, _ = nnx.split(small("attention"), nnx.Param, nnx.BatchStat)
    frozen = leaves(rate_scales(params, "new layers", TransferConfig(), RESNET18))
    assert {name.split("/")[0] for name, rate in frozen.items() if rate} == {"head", "attention"}
    assert all(jax.tree.leaves(rate_scales(params, "all layers", TransferConfig(), RESNET18)))


def test_frozen_features_match_backbone_in_training():
    model = set_phase(small("dense"), "new layers")
    x = jax.random.uniform(jax.random.key(0), (3, 33, 40, 2))
    backbone_only = model.backbone.feature_map(jnp.repeat(x[..., 1:], 3, axis=-1), Mode()).mean(
        (1, 2)
    )
    training = model(x, Mode(train=True)).features
    np.testing.assert_allclose(training, backbone_only, rtol=1e-5)
    assert not np.allclose(
        set_phase(model, "all layers")(x, Mode(train=True)).features, backbone_only, rtol=1e-2
    )


def test_attention_head_uses_mask_and_dense_head_does_not():
    x = jax.random.uniform(jax.random.key(0), (2, 40, 40, 2))
    other = x.at[..., 0].set(1 - x[..., 0])
    for head, differs in (("dense", False), ("attention", True)):
        forward = nnx.jit(lambda model, x: model(x, Mode()).logits)
        model = small(head)
        assert np.allclose(forward(model, x), forward(model, other)) != differs


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_channels_are_assigned_to_three_colors(channels):
    model = small("dense", channels)
    inputs = []
    model.backbone.feature_map = lambda image, mode: (
        inputs.append(image) or jnp.zeros((1, 2, 2, 512))
    )
    image = np.random.default_rng(0).normal(size=(1, 4, 4, channels)).astype(np.float32)
    model(jnp.concatenate([jnp.ones((1, 4, 4, 1)), image], -1), Mode())
    expected = {
        1: [[0], [0], [0]],
        2: [[0], [1], []],
        3: [[0], [1], [2]],
        5: [[0, 3], [1, 4], [2]],
    }[channels]
    for color, sources in enumerate(expected):
        mean = image[..., sources].mean(-1) if sources else np.zeros((1, 4, 4))
        np.testing.assert_allclose(inputs[0][..., color], mean, atol=1e-6)


def test_build_loads_published_weights_and_abstract_classifier_has_same_shape():
    from perturbjax.models.transfer import abstract_classifier, build
    from perturbjax.models.weights import load_pretrained

    transfer = TransferConfig(weights="package:efficientnet_lite0", head="attention")
    shape = {"classes": 5, "channels": 3, "dropout": 0.2, "copies": 1}
    model, provenance = build("efficientnet_lite0", transfer, **shape, seed=0)
    published = load_pretrained("efficientnet_lite0", transfer.weights).model
    assert provenance["sha256"].startswith("57934424") and provenance["padding"] == "same"
    np.testing.assert_array_equal(
        model.backbone.top.conv.kernel[...], published.top.conv.kernel[...]
    )
    empty = abstract_classifier(provenance, transfer, **shape)
    mine, other = (
        jax.tree.map(jnp.shape, leaves(nnx.split(m, nnx.Param, ...)[1])) for m in (model, published)
    )
    assert {k: v for k, v in mine.items() if k.startswith("backbone/")}.keys() == {
        f"backbone/{k}" for k in other if not k.startswith("head/")
    }
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    other_graphdef, other_params, other_stats = nnx.split(empty, nnx.Param, nnx.BatchStat)
    assert graphdef == other_graphdef
    shapes = [
        jax.tree.map(lambda leaf: leaf.shape, tree)
        for tree in ((params, stats), (other_params, other_stats))
    ]
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(shapes[1])
