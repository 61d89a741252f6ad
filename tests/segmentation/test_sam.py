"""The network of Cellpose 4 agrees with the Segment Anything encoder of transformers and a
pixelwise readout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from perturbjax.core.errors import InputError
from perturbjax.models.layers import Mode
from perturbjax.models.pytorch_files import write_tensors
from perturbjax.segmentation import Segmenter, weight_files
from perturbjax.segmentation.sam import SamConfig
from perturbjax.segmentation.weights import build, load_weights

pytestmark = pytest.mark.full

WIDTH, HEADS, NECK, PATCH, GRID, OUTPUTS = 24, 3, 16, 8, 8, 3
SIDE = PATCH * GRID
#: Relative positions in the weights of each block: the required number, fewer, and more.
REACH = (15, 9, 31)

_NAMES = {
    "patch_embed.projection": "patch_embed.proj",
    "layers": "blocks",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "neck.conv1": "neck.0",
    "neck.norm1": "neck.1",
    "neck.conv2": "neck.2",
    "neck.norm2": "neck.3",
}


class Published(torch.nn.Module):
    """Reference network: encoder, 1 x 1 convolution to the pixels of a patch, pixel shuffle."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = SamVisionConfig(
            hidden_size=WIDTH,
            num_hidden_layers=len(REACH),
            num_attention_heads=HEADS,
            output_channels=NECK,
            image_size=SIDE,
            patch_size=PATCH,
            window_size=0,
            global_attn_indexes=list(range(len(REACH))),
            mlp_dim=4 * WIDTH,
            layer_norm_eps=1e-6,
            attn_implementation="eager",
        )
        self.encoder = SamVisionEncoder(config)
        self.out = torch.nn.Conv2d(NECK, OUTPUTS * PATCH**2, 1)
        for layer, reach in zip(self.encoder.layers, REACH, strict=True):
            for name in ("rel_pos_h", "rel_pos_w"):
                setattr(layer.attn, name, torch.nn.Parameter(torch.empty(reach, WIDTH // HEADS)))
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        for name, parameter in self.named_parameters():
            if "norm" in name and name.endswith("weight"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)

    def forward(self, x):
        return torch.nn.functional.pixel_shuffle(self.out(self.encoder(x).last_hidden_state), PATCH)

    def tensors(self):
        """Return the tensors under the names of the published file."""
        tensors = {}
        for name, value in self.state_dict().items():
            for ours, theirs in _NAMES.items():
                name = name.replace(ours, theirs).replace("norm.1", "norm1")
            tensors[name] = value.numpy()
        values = OUTPUTS * PATCH**2
        tensors["W2"] = np.eye(values, dtype=np.float32).reshape(values, OUTPUTS, PATCH, PATCH)
        return tensors


@pytest.fixture(scope="module")
def published():
    return Published().eval()


@pytest.fixture(scope="module")
def path(published, tmp_path_factory):
    write_tensors(path := tmp_path_factory.mktemp("sam") / "cpsam.pth", published.tensors())
    return path


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)


def test_cpsam_agrees_with_the_reference_network(published, path, images):
    with torch.no_grad():
        theirs = (
            published(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
        )
    model = build(*load_weights(path))
    ours = jax.jit(lambda model, x: model(x).maps)(model, jnp.asarray(images))
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_cpsam_bfloat16_is_close_to_float32(path, images):
    model = build(*load_weights(path))
    exact, rounded = (
        jax.jit(lambda model, x, dtype=dtype: model(x, Mode(dtype=dtype)).maps)(
            model, jnp.asarray(images)
        )
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert np.corrcoef(np.ravel(exact), np.ravel(rounded))[0, 1] > 0.999
    assert np.abs(exact - rounded).max() > 0


def test_load_weights_derives_the_shape_of_cpsam(path):
    assert load_weights(path)[0] == SamConfig(WIDTH, HEADS, REACH, PATCH, GRID, NECK, OUTPUTS)


def test_segmenter_runs_cpsam_on_any_size_and_channels(path):
    segmenter = Segmenter(path)
    assert (
        segmenter.precision == "bfloat16"
        and Segmenter(path, precision="float32").precision == "float32"
    )
    assert (
        segmenter.plan(np.zeros((5, 40, 3))).tile
        == (SIDE, SIDE)
        == segmenter.plan(np.zeros((200, 90, 3))).tile
    )
    random = np.random.default_rng(0)
    for shape in ((5, 40), (100, 70, 2)):
        image = random.integers(0, 600, shape).astype(np.uint16)
        image[:, :10] = 60000
        (result,) = segmenter.masks([image])
        assert result.labels.shape == shape[:2] and result.present


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("encoder.blocks.1.mlp.lin1.bias"),
            r"encoder\.blocks\.1\.mlp\.lin1\.bias is miss",
        ),
        (
            lambda tensors: tensors.pop("encoder.neck.0.weight"),
            r"encoder\.neck\.0\.weight is missing",
        ),
        (lambda tensors: tensors.update(W2=tensors["W2"][::-1].copy()), "W2 is not the identity"),
        (
            lambda tensors: tensors.update({"out.bias": np.zeros(65, np.float32)}),
            "are not those of cpsam",
        ),
        (
            lambda tensors: tensors.update({"out.weight": np.zeros((192, 5, 1, 1), np.float32)}),
            "does not fit",
        ),
    ],
)
def test_load_weights_refuses_damaged_cpsam(published, tmp_path, change, message):
    tensors = published.tensors()
    change(tensors)
    write_tensors(path := tmp_path / "cpsam.pth", tensors)
    with pytest.raises(InputError, match=message):
        load_weights(path)


def test_cpsam_has_a_published_checksum():
    assert (
        weight_files.FILES["cpsam"].endswith("/cpsam") and len(weight_files.DIGESTS["cpsam"]) == 64
    )
