"""The network of channels: every channel alone, however many, and the same answer to a site turned or mirrored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perturbjax.models import Mode
from perturbjax.models.backbone import HALF
from perturbjax.models.channels import TOGETHER, ChannelClassifier
from perturbjax.models.layers import Conv
from perturbjax.models.symmetries import dihedral

#: Features of a channel: the first stage's, three ways.
SEEN = 3 * 7


class Backbone(nnx.Module):
    """Two convolutions: a network of photographs as far as its inputs and outputs go."""

    stage_widths = (7, 5)

    def __init__(self):
        self.conv = Conv(3, 7, stride=2, rngs=nnx.Rngs(0))
        self.last = Conv(7, 5, stride=2, rngs=nnx.Rngs(1))

    def stage_maps(self, x, mode):
        found = jax.nn.relu(self.conv(x))
        return [found, self.last(found)]


def forward(model: ChannelClassifier, x: jax.Array):
    return nnx.jit(lambda model, x: model(x, Mode()))(model, x)


def small(channels: int = 2, ways: int = 1, symmetries: int = 1) -> ChannelClassifier:
    shape = {"classes": 3, "channels": channels, "ways": ways, "symmetries": symmetries}
    return ChannelClassifier(Backbone(), **shape, dropout=0.0, colours=HALF, rngs=nnx.Rngs(1))


def site(channels: int, n: int = 2) -> jax.Array:
    image = jax.random.uniform(jax.random.key(0), (n, 40, 40, channels))
    return jnp.concatenate([jnp.ones((n, 40, 40, 1)).at[:, :9].set(0), image], axis=-1)


@pytest.mark.parametrize(("channels", "ways"), [(1, 1), (6, 1), (12, 2)])
def test_features_are_those_of_the_stored_channels_and_statistics_of_all(channels, ways):
    out = forward(small(channels, ways), site(channels))
    assert out.features.shape == (2, channels // ways * SEEN + channels * 5 + 2) and out.logits.shape == (2, 3)


def test_a_channel_s_features_do_not_depend_on_the_others_and_not_on_its_exposure():
    model, x = small(), site(2)
    other = x.at[..., 2].set(x[::-1, ..., 2])
    brighter = jnp.log1p(3 * jnp.expm1(x[..., 1:]) + 1)
    brighter = jnp.concatenate([x[..., :1], brighter], axis=-1)
    seen, with_other, exposed = (forward(model, one).features for one in (x, other, brighter))
    np.testing.assert_allclose(with_other[:, :SEEN], seen[:, :SEEN], atol=1e-5)
    np.testing.assert_allclose(exposed[:, : 2 * SEEN], seen[:, : 2 * SEEN], atol=1e-3)


def test_averaged_over_all_symmetries_a_turned_site_has_the_same_features():
    x = site(1)
    for symmetries, same in ((1, False), (8, True)):
        model = small(1, symmetries=symmetries)
        assert np.allclose(forward(model, dihedral(x, 5)).features, forward(model, x).features, atol=1e-4) == same


@pytest.mark.parametrize("n", [TOGETHER // 4 + 1, TOGETHER])
def test_sites_in_turn_have_the_features_they_have_alone(n):
    model, x = small(2, symmetries=3), site(2, n)
    features = forward(model, x).features
    for row in (0, n - 1):
        np.testing.assert_allclose(features[row], forward(model, x[row : row + 1]).features[0], rtol=1e-4, atol=1e-5)
