"""DINOv2 matches the transformers library on files that transformers writes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from perturbjax import models
from perturbjax.core.config import TransferConfig
from perturbjax.core.errors import InputError
from perturbjax.models import BACKBONES, Mode, transfer
from perturbjax.models.dinov2 import SIZES, cubic_weights
from perturbjax.models.weights import load_pretrained

pytestmark = pytest.mark.full


def published(folder, *, size: str = "small", registers: bool = False, image_size: int = 98):
    """Create transformers' network with random weights, and its safetensors file."""
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    width, depth, heads = SIZES[size]
    config, network = (
        (
            functools.partial(Dinov2WithRegistersConfig, num_register_tokens=4),
            Dinov2WithRegistersModel,
        )
        if registers
        else (Dinov2Config, Dinov2Model)
    )
    torch.manual_seed(0)
    theirs = network(
        config(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            image_size=image_size,
            patch_size=14,
        )
    ).eval()
    generator = torch.Generator().manual_seed(1)
    for (
        name,
        parameter,
    ) in theirs.named_parameters():  # initial values 0 and 1 would hide swapped tensors
        spread = (
            0.5
            if "lambda" in name or "norm" in name or "register" in name or "bias" in name
            else 0.04
        )
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * spread)
    theirs.save_pretrained(folder)
    return theirs, folder / "model.safetensors"


def images(height: int, width: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, height, width, 3)).astype(np.float32)


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "registers"])
def small(request, tmp_path_factory):
    theirs, file = published(tmp_path_factory.mktemp("dinov2"), registers=request.param)
    name = "dinov2_small_registers" if request.param else "dinov2_small"
    return name, theirs, load_pretrained(name, str(file))


# Size of the stored positions, larger, smaller, not square, not a multiple of a patch.
@pytest.mark.parametrize(
    "sizes",
    [
        (98, 98),
        *(
            pytest.param(sizes, marks=pytest.mark.slow)
            for sizes in ((224, 224), (28, 28), (65, 110))
        ),
        (56, 126),
    ],
)
def test_tokens_match_transformers_at_every_size(small, sizes):
    _, theirs, pretrained = small
    x = images(*sizes)
    with torch.no_grad():
        expected = theirs(to_torch(x))
    model = pretrained.model
    tokens, grid = (
        nnx.jit(lambda model, x: model.tokens(x, Mode())[0])(model, x),
        (sizes[0] // 14, sizes[1] // 14),
    )
    outputs = model(jnp.asarray(x), Mode())
    np.testing.assert_allclose(tokens, expected.last_hidden_state.numpy(), atol=1e-4)
    np.testing.assert_allclose(outputs.features, expected.pooler_output.numpy(), atol=1e-4)
    patches = expected.last_hidden_state[:, -grid[0] * grid[1] :].reshape(2, *grid, -1).numpy()
    np.testing.assert_allclose(model.feature_map(jnp.asarray(x), Mode()), patches, atol=1e-4)
    maps = model.stage_maps(jnp.asarray(x), Mode())
    assert tuple(scales.shape[-1] for scales in maps) == model.stage_widths
    np.testing.assert_allclose(maps[-1], patches, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("size", ["base", "large"])
def test_larger_networks_match_transformers(tmp_path, size, registers):
    theirs, file = published(tmp_path, size=size, registers=registers)
    name = f"dinov2_{size}{'_registers' if registers else ''}"
    x = images(70, 84, batch=1)
    with torch.no_grad():
        expected = theirs(to_torch(x)).pooler_output.numpy()
    ours = load_pretrained(name, str(file)).model(jnp.asarray(x), Mode()).features
    np.testing.assert_allclose(ours, expected, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", [name for name in BACKBONES if name.startswith("dinov2_")])
def test_parameter_sizes_match_transformers(name):
    """Networks without values have the parameter sizes of transformers, without mask tokens."""
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    record = BACKBONES[name]
    width, depth, heads = SIZES[name.split("_")[1]]
    config = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": 518,
    }
    with torch.device("meta"):
        if name.endswith("registers"):
            theirs = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**config, patch_size=14))
        else:
            theirs = Dinov2Model(Dinov2Config(**config))
    sizes = sorted(t.numel() for n, t in theirs.state_dict().items() if "mask_token" not in n)
    model = nnx.eval_shape(lambda: record.network(classes=0, inputs=3, rngs=nnx.Rngs(0)))
    assert (
        sorted(leaf.size for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)) if leaf.size)
        == sizes
    )
    assert record.license == "Apache-2.0" and record.source.startswith("hf:facebook/dinov2-")


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("before", "after"), [(37, 16), (16, 37), (7, 7), (37, 2), (5, 1)])
def test_cubic_weights_match_torch(before, after, antialias):
    column = torch.eye(before).reshape(1, before, before, 1)  # every channel one unit vector
    theirs = torch.nn.functional.interpolate(
        column.expand(1, before, before, before),
        (after, before),
        mode="bicubic",
        antialias=antialias,
    )
    np.testing.assert_allclose(
        cubic_weights(before, after, antialias=antialias), theirs[0, :, :, 0].T.numpy(), atol=1e-5
    )


def test_weights_with_and_without_registers_are_distinguished(small, tmp_path):
    name, theirs, _ = small
    theirs.save_pretrained(tmp_path)
    other = "dinov2_small" if name.endswith("registers") else "dinov2_small_registers"
    with pytest.raises(InputError, match=r"embeddings\.register_tokens"):
        load_pretrained(other, str(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match="dinov2 family"):
        load_pretrained("resnet18", str(tmp_path / "model.safetensors"))


@pytest.mark.slow
def test_dinov2_trains_on_mask_and_several_channels():
    model = models.create("dinov2_small", classes=3, channels=2, dropout=0.1, seed=0)
    x = jax.random.normal(jax.random.key(0), (2, 48, 48, 3))
    loss = nnx.jit(nnx.grad(lambda model, x: model(x, Mode(train=True)).logits.var()))
    gradients = nnx.to_flat_state(loss(model, x))
    unchanged = [path for path, leaf in gradients if not np.abs(leaf[...]).max() > 0]
    assert {path[-2:] for path in unchanged} <= {("key", "bias")}  # softmax is invariant to it


def test_rate_scales_fall_from_last_block_to_stem():
    record = BACKBONES["dinov2_small"]

    def classifier() -> nnx.Module:
        backbone = record.network(classes=0, inputs=3, rngs=nnx.Rngs(0))
        return transfer.TransferClassifier(
            backbone, head="dense", classes=2, channels=1, dropout=0.0, rngs=nnx.Rngs(0)
        )

    model = nnx.eval_shape(classifier)
    rates = transfer.rate_scales(
        nnx.state(model, nnx.Param),
        "all layers",
        TransferConfig(finetune_rate=1.0, layer_decay=0.5),
        record,
    )
    scales = {
        "/".join(map(str, path)): rate.get_raw_value() for path, rate in nnx.to_flat_state(rates)
    }
    assert scales["backbone/norm/scale"] == 1 and scales["backbone/blocks/11/dense1/kernel"] == 0.5
    assert scales["backbone/blocks/0/scale1"] == 0.5**12
    assert {scales[f"backbone/{part}"] for part in ("stem/kernel", "class_token", "positions")} == {
        0.5**13
    }
