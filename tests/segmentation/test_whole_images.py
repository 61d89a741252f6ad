"""`segment` agrees with the cellpose package at every size, scale and number of channels, and
refuses bad input."""

import http.server
import threading

import numpy as np
import pytest
import tifffile
from cellpose import metrics, models
from segmentation.test_cpnet import package_file, random_package_network

from perturbjax.core.errors import InputError
from perturbjax.models.pytorch_files import write_tensors
from perturbjax.segmentation import Segmenter, segment, weight_files
from perturbjax.segmentation.diameters import diameter_warning
from perturbjax.segmentation.foreground import percentiles
from perturbjax.segmentation.weights import load_weights

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def weights(shared):
    return shared / "data/weights/nuclei_dsb2018"


def nuclei(shared, count, part="test"):
    paths = sorted((shared / "data/dsb2018_nuclei" / part).glob("*_labels.tif"))[:count]
    return [tifffile.imread(p.with_name(p.name.replace("_labels", ""))) for p in paths], [
        tifffile.imread(p).astype(int) for p in paths
    ]


def network_maps(segmenter, image):
    """Run the network on one image with the package's normalization."""
    image = segmenter._with_channels(image)
    ends = [percentiles(image[..., channel]) for channel in range(image.shape[2])]
    ranges = np.array(
        [(low, high - low if high > low else np.inf) for low, high in ends], np.float32
    )
    maps = np.asarray(segmenter.maps([image], ranges[None])[0])
    return maps[: image.shape[0], : image.shape[1]]


def agreement(truth, masks, iou=0.9):
    return metrics.average_precision(truth.astype(int), masks.astype(int), [iou])[0][0]


@pytest.mark.shared
def test_segmenter_agrees_with_cellpose_on_real_nuclei(shared, weights):
    """Maps differ by at most 1e-4 of the largest value; masks agree with AP 0.98 at IoU 0.9."""
    package = models.CellposeModel(gpu=False, pretrained_model=str(weights))
    ours = Segmenter(weights)
    images, _ = nuclei(shared, 1)
    for image, result in zip(images, ours.masks(images), strict=True):
        masks, (_, flows, logits), _ = package.eval(image, channels=[0, 0], max_size_fraction=1.0)
        maps = network_maps(ours, image)
        for mine, theirs in ((np.moveaxis(maps[..., :2], -1, 0), flows), (maps[..., 2], logits)):
            error = np.abs(mine - theirs) / np.abs(theirs).max()
            print("relative error:", error.max())
            assert error.max() <= 1e-4
        assert masks.max() > 3 and agreement(masks, result.labels) >= 0.98


@pytest.mark.slow
@pytest.mark.shared
def test_segmenter_reaches_the_score_of_cellpose(shared, weights):
    """Cellpose reaches 0.661 / 0.521 / 0.217 at IoU 0.5 / 0.75 / 0.9."""
    images, truths = nuclei(shared, 40)
    masks = [result.labels.astype(int) for result in Segmenter(weights).masks(images)]
    scores = metrics.average_precision(truths, masks, [0.5, 0.75, 0.9])[0].mean(0)
    print("AP", scores)
    np.testing.assert_allclose(scores, [0.661, 0.521, 0.217], atol=0.005)


@pytest.mark.parametrize(
    ("channels", "shape", "rescale"), [(2, (61, 75), 1.0), (2, (90, 250), 0.6), (1, (40, 33), 2.0)]
)
def test_maps_agree_with_cellpose_for_scales_channels_and_tiles(channels, shape, rescale, tmp_path):
    path = package_file(random_package_network((2, 8, 16, 24, 32)), tmp_path / "weights.pth")
    network = random_package_network((2, 8, 16, 24, 32))
    network.mkldnn = False
    package = models.CellposeModel(gpu=False, pretrained_model=False)
    package.net, package.diam_mean, package.diam_labels = network, 30.0, 30.0
    image = np.random.default_rng(0).integers(0, 4000, (*shape, channels)).astype(np.uint16)
    # The package's tiles carry a style of 256 numbers, independent of the network.
    ours = Segmenter(path, diameter=30 / rescale)
    from cellpose import transforms

    normal = transforms.normalize_img(ours._with_channels(image).astype(np.float32))
    plan = ours.plan(image)
    scaled = transforms.resize_image(normal, rsz=[plan.rescale] * 2) if rescale != 1 else normal
    expected = package_maps(network, scaled)
    if rescale != 1:
        expected = transforms.resize_image(expected, *shape)
    maps = network_maps(ours, image)
    assert np.abs(maps - expected).max() <= 1e-4 * np.abs(expected).max()


def package_maps(network, image):
    """Run the network like `cellpose.core.run_net`, which accepts only styles of 256 numbers."""
    import torch
    from cellpose import transforms

    y1, y2, x1, x2 = transforms.get_pad_yx(*image.shape[:2])
    padded = np.pad(image.transpose(2, 0, 1), [(0, 0), (y1, y2), (x1, x2)])
    cut, rows, columns, high, wide = transforms.make_tiles(padded)
    with torch.no_grad():
        maps = network(torch.from_numpy(cut.reshape(-1, *cut.shape[2:])))[0].numpy()
    return transforms.average_tiles(maps, rows, columns, high, wide)[
        :, y1 : high - y2, x1 : wide - x2
    ].transpose(1, 2, 0)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Write weights of a small random network."""
    return package_file(
        random_package_network((2, 4, 8)), tmp_path_factory.mktemp("small") / "weights.pth"
    )


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((1, 1), np.uint16),
        np.full((50, 60), 7, np.uint8),
        np.full((30, 30), 65535, np.uint16),
        np.full((20, 20), np.nan, np.float32),
    ],
)
def test_segment_returns_empty_mask_without_contrast(image, small):
    masks = segment(image, small)
    assert masks.shape == image.shape and masks.dtype == np.uint16 and not masks.any()


def test_segment_is_independent_of_the_batch(small):
    """An empty image and images of other sizes in between change nothing."""
    rng = np.random.default_rng(0)
    images = [
        np.kron(rng.integers(0, 900, (shape[0] // 8, shape[1] // 8)), np.ones((8, 8))).astype(
            np.uint16
        )
        for shape in ((40, 48), (40, 48), (64, 32), (40, 48), (40, 48), (40, 48))
    ]
    images[1][:] = 7
    together = segment(images, small)
    for image, mask in zip(images, together, strict=True):
        np.testing.assert_array_equal(segment(image, small), mask)


@pytest.mark.slow
def test_segmenter_gives_the_same_objects_in_blocks(shared, weights, monkeypatch):
    images, _ = nuclei(shared, 4, "train")
    image = (
        np.vstack([np.hstack(images[:2]), np.hstack(images[2:4])])
        if len({i.shape for i in images}) == 1
        else images[0]
    )
    whole = next(Segmenter(weights).masks([image])).labels
    from perturbjax.segmentation import api

    monkeypatch.setattr(api, "BLOCK", 200)
    blocks = next(Segmenter(weights).masks([image])).labels
    assert blocks.shape == image.shape and agreement(whole, blocks, 0.75) >= 0.95


@pytest.mark.parametrize("diameter", [-3.0, 0.5, 1e6, float("nan")])
def test_segmenter_refuses_impossible_diameter(diameter, small):
    with pytest.raises(InputError, match="--diameter"):
        Segmenter(small, diameter)


def test_segmenter_refuses_wrong_shapes(small):
    for shape in ((8, 8, 3), (0, 8), (8,), (2, 8, 8, 1)):
        with pytest.raises(InputError, match="an image of shape"):
            list(Segmenter(small).masks([np.zeros(shape, np.uint8)]))


def test_load_weights_refuses_other_networks(tmp_path, small):
    write_tensors(path := tmp_path / "other.pth", {"fc.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(InputError, match="no layer of Cellpose"):
        load_weights(path)
    (cut := tmp_path / "cut").write_bytes(small.read_bytes()[:5000])
    with pytest.raises(InputError, match="damaged, cut short"):
        load_weights(cut)


def test_load_weights_refuses_numbers_that_are_not_finite(tmp_path):
    network = random_package_network((2, 4, 8))
    network.output[2].bias.data[0] = float("nan")
    with pytest.raises(InputError, match=r"output\.2\.bias contains numbers that are not finite"):
        load_weights(package_file(network, tmp_path / "weights.pth"))


def test_diameter_warning_suggests_a_diameter():
    fit, tiny = np.full(20, 30.0), np.full(20, 12.0)
    agree, disagree = np.full(20, 0.05), np.full(20, 0.9)
    assert diameter_warning([(agree, fit)], 30) == ""
    assert "try --diameter 12" in diameter_warning([(agree, tiny)], 30)
    assert "try --diameter 60" in diameter_warning([(disagree, fit)], 30)
    assert diameter_warning([], 30) == ""


@pytest.mark.slow
@pytest.mark.shared
def test_segment_warns_about_nuclei_of_three_times_the_size(shared, weights, capsys):
    images, _ = nuclei(shared, 3, "train")
    segment([np.kron(image[:120, :120], np.ones((4, 4), image.dtype)) for image in images], weights)
    assert "try --diameter" in capsys.readouterr().err


@pytest.fixture
def server(small):
    """Serve the weights under the published name, and half of the file under another."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = small.read_bytes()
            if not self.path.endswith(("nucleitorch_0", "cyto3")):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(
                content if self.path.endswith("nucleitorch_0") else content[: len(content) // 2]
            )

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/models"
        server.shutdown()


def test_find_downloads_published_weights_once_and_completely(server, tmp_path, monkeypatch, small):
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path / "models"))
    path = weight_files.find("nuclei", server)
    assert path.read_bytes() == small.read_bytes() and path == tmp_path / "models/nucleitorch_0"
    assert weight_files.find("nuclei", "http://127.0.0.1:9/gone") == path
    with pytest.raises(InputError, match=r"--weights cyto3: .* stopped"):
        weight_files.find("cyto3", server)
    with pytest.raises(InputError, match=r"--weights cyto2: .* cannot be downloaded"):
        weight_files.find("cyto2", server)
    assert [file.name for file in (tmp_path / "models").iterdir()] == ["nucleitorch_0"]
    monkeypatch.setitem(weight_files.DIGESTS, "nuclei", "0" * 64)
    path.unlink()
    with pytest.raises(InputError, match="differs from the published file"):
        weight_files.find("nuclei", server)


def test_segmenter_refuses_unknown_weights():
    with pytest.raises(
        InputError, match=r"--weights cyto9: no such file, .* nuclei, cyto, cyto2, cyto3"
    ):
        Segmenter("cyto9")
