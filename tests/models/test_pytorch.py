"""Import and export of the original's checkpoints are exact; misfits are named."""

import numpy as np
import pytest
import torch
from flax import nnx
from reference.original import REFERENCES, Classifier

from perturbjax import models
from perturbjax.core.errors import InputError
from perturbjax.models import pytorch as exchange
from perturbjax.models.pytorch_files import read_tensors, write_tensors

NAMES = list(REFERENCES)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, np.ndarray]:
    """State dict with the names and shapes of the published checkpoint: 304 classes."""
    path = tmp_path_factory.mktemp("published") / "weights.pth"
    torch.manual_seed(0)
    torch.save(Classifier(304).state_dict(), path)
    return read_tensors(path)


def test_import_reads_published_names(tmp_path, published):
    assert "image_features.0.weight" in published and list(published)[-1] == "classifier.3.bias"
    write_tensors(tmp_path / "weights.pth", published)
    imported = exchange.import_state_dict(tmp_path / "weights.pth", "attention")
    assert (imported.classes, imported.channels, imported.image_size) == (304, 1, None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip_is_bit_identical(tmp_path, name, suffix):
    torch.manual_seed(0)
    sized = {"image_size": 24} if name in models.FIXED_SIZE_NETWORKS else {}
    reference = REFERENCES[name](7, channels=2, **sized)
    reference.train()(torch.rand(4, 3, 24, 24))
    torch.save({"epoch": 1, "model_state_dict": reference.state_dict()}, tmp_path / "in.pth")
    imported = exchange.import_state_dict(tmp_path / "in.pth", name)
    assert (imported.classes, imported.channels, imported.image_size, imported.batches) == (
        7,
        2,
        sized.get("image_size"),
        1,
    )

    network = exchange.abstract_network(
        name, imported.classes, imported.channels, imported.image_size
    )
    nnx.update(network, imported.params, imported.stats)
    out = tmp_path / f"out{suffix}"
    write_tensors(out, exchange.state_dict(name, network, batches=imported.batches))
    if suffix == ".pth":
        back = torch.load(out, weights_only=True)
    else:
        from safetensors.torch import load_file

        back = load_file(out)
    expected = reference.state_dict()
    assert set(back) == set(expected)
    assert all(back[n].dtype == t.dtype and torch.equal(back[n], t) for n, t in expected.items())
    REFERENCES[name](7, channels=2, **sized).load_state_dict(back)


def test_import_converts_half_precision_to_float32(tmp_path, published):
    halves = {n: t.astype(np.float16) if t.dtype == np.float32 else t for n, t in published.items()}
    write_tensors(tmp_path / "half.pth", halves)
    imported = exchange.import_state_dict(tmp_path / "half.pth", "attention")
    kernel = nnx.to_pure_dict(imported.params)["head"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, halves["classifier.3.weight"].T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("attention.attention_conv.1.running_var"),
            r"tensor attention\.attention_conv\.1\.running_var is missing",
        ),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "tensor extra is unexpected"),
        (
            lambda t: t.update({"mask_features.4.weight": np.zeros((64, 32, 5, 5), np.float32)}),
            r"mask_features\.4\.weight has shape \(64, 32, 5, 5\), expected \(64, 32, 3, 3\)",
        ),
        (
            lambda t: t.update({"classifier.0.bias": np.zeros(128, np.int64)}),
            r"classifier\.0\.bias has dtype int64",
        ),
        (
            lambda t: t.update({"classifier.3.bias": np.zeros(9, np.float32)}),
            r"classifier\.3\.weight",
        ),
        (
            lambda t: t.update({"image_features.0.weight": np.zeros(4, np.float32)}),
            r"image_features\.0\.weight",
        ),
    ],
    ids=["missing", "extra", "mis-shaped", "integers", "heads disagree", "flat kernel"],
)
def test_import_names_tensor_that_does_not_fit(tmp_path, published, change, message):
    tensors = dict(published)
    change(tensors)
    write_tensors(tmp_path / "odd.pth", tensors)
    with pytest.raises(InputError, match=message) as raised:
        exchange.import_state_dict(tmp_path / "odd.pth", "attention")
    assert "odd.pth" in str(raised.value)


def test_import_without_counterpart_lists_networks(tmp_path, published):
    write_tensors(tmp_path / "weights.pth", published)
    with pytest.raises(InputError, match="attention, attention_multiscale, masked_cnn"):
        exchange.import_state_dict(tmp_path / "weights.pth", "resnet18")
