"""A network on one image of unknown scale: how large its objects are, its maps, and the objects in them."""

from __future__ import annotations

import numpy as np
import scipy.ndimage as ndi
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from perturbjax.segmentation import dynamics, tiles
from perturbjax.segmentation.cpnet import CPnet
from perturbjax.segmentation.targets import diameters

#: Tiles the network takes at once; fewer are filled up, so that one program serves all images.
BATCH = 4
#: Diameters a first guess may name, in pixels, and the ratio of found to guessed beyond which the image is looked at
#: again at the scale that was found.
GUESSES, AGREEMENT = (8.0, 60.0), 1.3
#: Scales are powers of this, so that images of nearly one scale share compiled programs.
SCALE_STEP = 2**0.25


@nnx.jit
def _maps(model: CPnet, images: Float[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
    return model(images).maps


def maps(model: CPnet, image: Num[np.ndarray, "h w c"], rescale: float) -> Float[Array | np.ndarray, "hb wb 3"]:
    """Flows and logits at the image's own scale, from the network at `rescale` times it, padded as in `tiles.Plan`."""
    plan = tiles.Plan(*image.shape[:2], rescale)
    high, wide = plan.padded
    padded = np.pad(image, ((0, high - image.shape[0]), (0, wide - image.shape[1]), (0, 0)))
    joined = tiles.cut(padded[None], tiles.percentiles(image)[None], plan.y.cut, plan.x.cut)
    grid = (plan.y.tiles, plan.x.tiles)
    parts = [_maps(model, tiles.chunk(joined, grid, start, BATCH)) for start in range(0, plan.count, BATCH)]
    return tiles.join(tuple(parts), plan.y.join(high), plan.x.join(wide), grid, 1)[0]


def segment(
    model: CPnet, image: Num[np.ndarray, "h w"], diameter: float = 0.0, rules: dynamics.Rules | None = None
) -> Int[np.ndarray, "h w"]:
    """Instance labels of one plane.

    Args:
        diameter: of a typical object in pixels. With 0 it is guessed from the bright part of the image, and guessed
            anew from the objects found where these are of another size, or where none is found.
    """
    if diameter:
        return _at(model, image, diameter, rules)
    guess = guessed_diameter(image)
    found = _at(model, image, guess, rules)
    for _ in range(2):
        sizes = diameters(found)
        better = float(np.median(sizes)) if len(sizes) else guess / 2
        if max(better / guess, guess / better) < AGREEMENT or not GUESSES[0] / 2 < better < 2 * GUESSES[1]:
            break
        again = _at(model, image, better, rules)
        if not again.any():
            break
        guess, found = better, again
    return found


def _at(model: CPnet, image: np.ndarray, diameter: float, rules: dynamics.Rules | None) -> np.ndarray:
    rescale = SCALE_STEP ** round(np.log(model.config.diam_mean / diameter) / np.log(SCALE_STEP))
    flows = maps(model, image[..., None], min(rescale, 4.0))
    return dynamics.objects(flows, *image.shape, round(dynamics.STEPS / min(rescale, 1.0)), rules).labels


def guessed_diameter(image: Num[np.ndarray, "h w"]) -> float:
    """Six times the mean depth of what is brighter than Otsu's threshold of the root: a disk's diameter."""
    from skimage.filters import threshold_otsu

    plane = ndi.gaussian_filter(image.astype(np.float32), 1)
    plane = np.sqrt(plane - plane.min())
    if np.ptp(plane) < 1e-6:
        return GUESSES[1] / 2
    depth = ndi.distance_transform_edt(plane > threshold_otsu(plane))
    return float(np.clip(6 * depth[depth > 0].mean(), *GUESSES))
