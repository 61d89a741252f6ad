"""The network of Cellpose 3 agrees with the cellpose package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cellpose.resnet_torch import CPnet as Theirs
from flax import nnx

from perturbjax.models.layers import Mode
from perturbjax.models.pytorch_files import read_tensors, write_tensors
from perturbjax.segmentation import cpnet
from perturbjax.segmentation.weights import build, load_weights, save_weights, tensor_name

pytestmark = pytest.mark.full

WIDTHS = [(2, 32, 64, 128, 256), (1, 8, 16), (3, 12, 20, 28), (2, 16, 32, 64, 96, 128)]


def random_package_network(widths, seed=0, outputs=3):
    """Return the package's network with random weights and statistics, in evaluation mode."""
    torch.manual_seed(seed)
    network = Theirs(list(widths), outputs, 3)
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand_like(buffer) + (0.5 if name.endswith("var") else -0.5))
    for name, parameter in network.named_parameters():
        if name.endswith("0.weight") and parameter.ndim == 1:
            parameter.data = torch.rand_like(parameter) + 0.5
    return network.eval()


def package_file(network, path):
    write_tensors(path, {name: value.numpy() for name, value in network.state_dict().items()})
    return path


def compare(ours, theirs, tolerance=1e-4):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def check_parity(network, path, widths, height, width):
    x = np.random.default_rng(0).normal(size=(2, height, width, widths[0])).astype(np.float32)
    with torch.no_grad():
        maps, style, _ = network(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    model = build(*load_weights(path))
    outputs = jax.jit(lambda model, x: model(x))(model, jnp.asarray(x))
    compare(outputs.maps, maps.numpy().transpose(0, 2, 3, 1))
    compare(outputs.style, style.numpy())


@pytest.mark.parametrize("widths", WIDTHS)
def test_cpnet_agrees_with_cellpose_for_any_widths(widths, tmp_path):
    network = random_package_network(widths)
    path = package_file(network, tmp_path / "weights.pth")
    multiple = 2 ** (len(widths) - 2)
    check_parity(network, path, widths, 4 * multiple, 7 * multiple)
    assert load_weights(path)[0].nbase == widths


def test_cpnet_agrees_with_cellpose_for_real_weights(shared):
    path = shared / "data/weights/nuclei_dsb2018"
    network = Theirs([2, 32, 64, 128, 256], 3, 3)
    network.load_model(str(path))
    check_parity(network.eval(), path, (2, 32, 64, 128, 256), 104, 136)
    config, _ = load_weights(path)
    assert config.diam_mean == 30 and config.diam_labels == pytest.approx(23.329, abs=1e-3)


def test_cpnet_training_agrees_with_cellpose(tmp_path):
    """One step of the mean square of the maps: gradients within 1e-3 of the largest, statistics
    within 1e-4.

    The decoder's shortcuts are normalised before their pixels are repeated, so that n / (n - 1),
    the correction of their variance, counts a quarter of the pixels: 1e-3 at this size of image.
    """
    widths = (2, 8, 16, 24)
    network = random_package_network(widths)
    model = build(*load_weights(package_file(network, tmp_path / "weights.pth")))
    x = np.random.default_rng(0).normal(size=(4, 16, 24, 2)).astype(np.float32)
    network.train()
    network(torch.from_numpy(x.transpose(0, 3, 1, 2)))[0].square().mean().backward()
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss(params, stats):
        model = nnx.merge(graph, params, stats, copy=True)
        value = jnp.square(model(jnp.asarray(x), Mode(train=True)).maps).mean()
        return value, nnx.state(model, nnx.BatchStat)

    gradients, moved = jax.jit(jax.grad(loss, has_aux=True))(params, stats)
    ours = {tensor_name(key): np.asarray(leaf[...]) for key, leaf in nnx.to_flat_state(gradients)}
    largest = max(float(p.grad.abs().max()) for p in network.parameters() if p.grad is not None)
    for name, parameter in network.named_parameters():
        if name.startswith("diam"):
            continue
        gradient = parameter.grad.numpy()
        wanted = {4: (2, 3, 1, 0), 2: (1, 0)}.get(gradient.ndim, (0,))
        assert np.abs(ours[name] - gradient.transpose(wanted)).max() <= 1e-3 * largest, name
    theirs = dict(network.named_buffers())
    for key, leaf in nnx.to_flat_state(moved):
        repeated = key[0] == "up" and key[2] == "proj" and key[-1] == "var"
        compare(leaf[...], theirs[tensor_name(key)].numpy(), tolerance=1e-3 if repeated else 1e-4)


def test_save_weights_is_lossless_and_uses_cellpose_names(tmp_path):
    model = cpnet.create(cpnet.CPnetConfig((1, 4, 8), diam_mean=17.0, diam_labels=21.0), seed=3)
    path = tmp_path / "own.safetensors"
    save_weights(path, model, {"command": "train"})
    config, params = load_weights(path)
    assert config == model.config
    for (key, ours), (_, back) in zip(
        nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(params), strict=True
    ):
        np.testing.assert_array_equal(ours[...], back[...], err_msg=str(key))
    theirs = Theirs([1, 4, 8], 3, 3)
    names = {
        name
        for name in theirs.state_dict()
        if "num_batches" not in name and not name.startswith("diam")
    }
    assert set(read_tensors(path)) == names


def test_cpnet_refuses_sizes_that_cannot_be_halved():
    model = cpnet.create(cpnet.CPnetConfig((1, 4, 8, 8)))
    with pytest.raises(ValueError, match="multiples of 4"):
        model(jnp.zeros((1, 10, 8, 1)))
