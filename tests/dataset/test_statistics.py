"""Statistics of the pixels of a site."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from perturbjax.dataset import site_statistics


@given(
    arrays(
        st.sampled_from([np.dtype(np.uint8), np.dtype(np.uint16)]),
        array_shapes(min_dims=3, max_dims=3, max_side=6),
    )
)
def test_statistics_equal_those_of_numpy(image: np.ndarray) -> None:
    pixels = image.reshape(-1, image.shape[-1]).astype(np.float64)
    percentiles = np.percentile(pixels, (1, 50, 99), axis=0)
    expected = np.stack([pixels.mean(0), pixels.std(0), *percentiles], axis=-1)
    np.testing.assert_allclose(site_statistics(image), expected, rtol=1e-12, atol=1e-12)
