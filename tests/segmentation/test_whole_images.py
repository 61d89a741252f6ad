"""Images to masks: the package's masks, at every size, scale and number of channels; and bad input."""

import http.server
import threading

import numpy as np
import pytest
import tifffile
from cellpose import metrics, models
from segmentation.test_cpnet import package_file, random_package_network

from perturbjax.core.errors import InputError
from perturbjax.models.pytorch_files import write_tensors
from perturbjax.segmentation import Segmenter, segment
from perturbjax.segmentation import diameters as sizes
from perturbjax.segmentation import weight_files as names
from perturbjax.segmentation.weights import load_weights


@pytest.fixture(scope="module")
def weights(shared):
    return shared / "data/weights/nuclei_dsb2018"


def nuclei(shared, count, part="test"):
    paths = sorted((shared / "data/dsb2018_nuclei" / part).glob("*_labels.tif"))[:count]
    return [tifffile.imread(p.with_name(p.name.replace("_labels", ""))) for p in paths], [
        tifffile.imread(p).astype(int) for p in paths
    ]


def agreement(truth, found, iou=0.9):
    return metrics.average_precision(truth.astype(int), found.astype(int), [iou])[0][0]


@pytest.mark.shared
def test_masks_of_real_nuclei_are_the_packages(shared, weights):
    """Maps within 1e-4 of the package's largest value, and masks of AP 0.98 against its own at IoU 0.9."""
    package = models.CellposeModel(gpu=False, pretrained_model=str(weights))
    ours = Segmenter(weights)
    images, _ = nuclei(shared, 1)
    for image, found in zip(images, ours.masks(images), strict=True):
        masks, (_, flows, logits), _ = package.eval(image, channels=[0, 0], max_size_fraction=1.0)
        maps = np.asarray(ours.maps([ours._with_channels(image)])[0])[
            : image.shape[0], : image.shape[1]
        ]
        for mine, theirs in ((np.moveaxis(maps[..., :2], -1, 0), flows), (maps[..., 2], logits)):
            error = np.abs(mine - theirs) / np.abs(theirs).max()
            print("relative error:", error.max())
            assert error.max() <= 1e-4
        assert masks.max() > 3 and agreement(masks, found.labels) >= 0.98


@pytest.mark.slow
@pytest.mark.shared
def test_all_forty_images_score_what_the_package_scores(shared, weights):
    """0.661 / 0.521 / 0.217 at IoU 0.5 / 0.75 / 0.9, each within 0.005."""
    images, truths = nuclei(shared, 40)
    found = [objects.labels.astype(int) for objects in Segmenter(weights).masks(images)]
    scores = metrics.average_precision(truths, found, [0.5, 0.75, 0.9])[0].mean(0)
    print("AP", scores)
    np.testing.assert_allclose(scores, [0.661, 0.521, 0.217], atol=0.005)


@pytest.mark.parametrize(
    ("channels", "shape", "rescale"), [(2, (61, 75), 1.0), (2, (90, 250), 0.6), (1, (40, 33), 2.0)]
)
def test_maps_of_rescaled_two_channel_and_tiled_images_are_the_packages(
    channels, shape, rescale, tmp_path
):
    path = package_file(random_package_network((2, 8, 16, 24, 32)), tmp_path / "weights.pth")
    network = random_package_network((2, 8, 16, 24, 32))
    network.mkldnn = False
    package = models.CellposeModel(gpu=False, pretrained_model=False)
    package.net, package.diam_mean, package.diam_labels = network, 30.0, 30.0
    image = np.random.default_rng(0).integers(0, 4000, (*shape, channels)).astype(np.uint16)
    # The package's tiles carry 256 numbers of style whatever the network.
    ours = Segmenter(path, diameter=30 / rescale)
    from cellpose import transforms

    normal = transforms.normalize_img(ours._with_channels(image).astype(np.float32))
    plan = ours.plan(image)
    scaled = transforms.resize_image(normal, rsz=[plan.rescale] * 2) if rescale != 1 else normal
    expected = package_maps(network, scaled)
    if rescale != 1:
        expected = transforms.resize_image(expected, *shape)
    maps = np.asarray(ours.maps([ours._with_channels(image)])[0])[: shape[0], : shape[1]]
    assert np.abs(maps - expected).max() <= 1e-4 * np.abs(expected).max()


def package_maps(network, image):
    """As `core.run_net`, which takes networks with a style of 256 numbers alone."""
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
    """Weights of a small network that says something of everything."""
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
def test_an_image_without_contrast_gives_masks_of_its_shape(image, small):
    masks = segment(image, small)
    assert masks.shape == image.shape and masks.dtype == np.uint16


def test_one_image_gives_what_it_gives_among_others(small):
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 900, shape).astype(np.uint16)
        for shape in ((40, 50), (40, 50), (64, 30), (40, 50))
    ]
    together = segment(images, small)
    for image, mask in zip(images, together, strict=True):
        np.testing.assert_array_equal(segment(image, small), mask)


@pytest.mark.slow
def test_an_image_in_blocks_has_the_objects_of_the_whole(shared, weights, monkeypatch):
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
def test_a_diameter_that_makes_no_sense_is_refused(diameter, small):
    with pytest.raises(InputError, match="--diameter"):
        Segmenter(small, diameter)


def test_images_of_too_many_channels_and_of_no_pixels_are_refused(small):
    for shape in ((8, 8, 3), (0, 8), (8,), (2, 8, 8, 1)):
        with pytest.raises(InputError, match="an image of shape"):
            list(Segmenter(small).masks([np.zeros(shape, np.uint8)]))


def test_other_weights_are_refused_in_one_line(tmp_path, small):
    write_tensors(path := tmp_path / "other.pth", {"fc.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(InputError, match="none of cellpose's layers"):
        load_weights(path)
    (cut := tmp_path / "cut").write_bytes(small.read_bytes()[:5000])
    with pytest.raises(InputError, match="damaged, cut short"):
        load_weights(cut)


def test_weights_of_numbers_that_are_not_finite_are_refused(tmp_path):
    network = random_package_network((2, 4, 8))
    network.output[2].bias.data[0] = float("nan")
    with pytest.raises(InputError, match=r"output\.2\.bias holds numbers that are not finite"):
        load_weights(package_file(network, tmp_path / "weights.pth"))


def test_objects_of_another_size_are_told_of():
    fit, tiny = np.full(20, 30.0), np.full(20, 12.0)
    agree, disagree = np.full(20, 0.05), np.full(20, 0.9)
    assert sizes.doubt_of([(agree, fit)], 30) == ""
    assert "try --diameter 12" in sizes.doubt_of([(agree, tiny)], 30)
    assert "try --diameter 60" in sizes.doubt_of([(disagree, fit)], 30)
    assert sizes.doubt_of([], 30) == ""


@pytest.mark.slow
@pytest.mark.shared
def test_nuclei_of_three_times_the_size_are_told_of(shared, weights, capsys):
    images, _ = nuclei(shared, 3, "train")
    segment([np.kron(image[:120, :120], np.ones((4, 4), image.dtype)) for image in images], weights)
    assert "try --diameter" in capsys.readouterr().err


@pytest.fixture
def server(small):
    """A server that has the weights under the published name, and half of them under another."""

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


def test_published_weights_are_fetched_once_and_whole_or_not_at_all(
    server, tmp_path, monkeypatch, small
):
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path / "models"))
    path = names.find("nuclei", server)
    assert path.read_bytes() == small.read_bytes() and path == tmp_path / "models/nucleitorch_0"
    assert names.find("nuclei", "http://127.0.0.1:9/gone") == path
    with pytest.raises(InputError, match=r"--weights cyto3: .* broke off"):
        names.find("cyto3", server)
    with pytest.raises(InputError, match=r"--weights cyto2: .* could not be fetched"):
        names.find("cyto2", server)
    assert [file.name for file in (tmp_path / "models").iterdir()] == ["nucleitorch_0"]
    monkeypatch.setitem(names.DIGESTS, "nuclei", "0" * 64)
    path.unlink()
    with pytest.raises(InputError, match="is not the published file"):
        names.find("nuclei", server)


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(
        InputError, match=r"--weights cyto9: no such file, .* nuclei, cyto, cyto2, cyto3"
    ):
        Segmenter("cyto9")
