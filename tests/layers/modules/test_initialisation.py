"""Initial values that a model's config states, against the published ones."""

import numpy as np
import pytest
from flax import nnx

from recollect.configuration import UserError, from_json, to_json
from recollect.layers import Attention, Mamba2
from recollect.layers.modules import ACTIVE_DORMANT, FLA, GLA, ZOOLOGY, Initialisation, LearnedPositions, SwiGLU
from recollect.models import LanguageModel, repeat

WIDTH, HIDDEN, DEPTH = 64, 192, 8


def drawn(initialisation, mixer=Attention(heads=2)):
    """One layer of a model with these initial values, its embedding and its positions."""
    config = LanguageModel(
        width=WIDTH,
        stages=repeat(mixer, depth=DEPTH),
        mlp=SwiGLU(hidden=HIDDEN),
        positions=LearnedPositions(maximum=100),
        initialisation=initialisation,
    )
    assert from_json(to_json(config)) == config
    model = config.build(500, nnx.Rngs(params=0))
    return next(model.stack.layers()), model.embedding[...], model.positions.table[...]


# What a matrix of so many inputs and outputs, and one that writes to the residual stream, deviate by; and embeddings.
PUBLISHED = {
    "none": (None, (lambda i, o: 0.02, lambda i, o: 0.02 / 4), 0.02),  # 4: the root of 2 x 8 layers
    "zoology": (ZOOLOGY, (lambda i, o: 0.02, lambda i, o: 0.02 / 4), 0.02),
    "fla": (FLA, (lambda i, o: 0.02, lambda i, o: 0.02), 0.02),
    "gla": (GLA, (lambda i, o: 2**-2.5 * (2 / (i + o)) ** 0.5, lambda i, o: 2**-2.5 * (2 / (i + o)) ** 0.5), 0.02),
    "active-dormant": (ACTIVE_DORMANT, (lambda i, o: (3 * i) ** -0.5, lambda i, o: (3 * i) ** -0.5), 1.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_matrices_and_embeddings_have_the_published_spread(name):
    initialisation, (inside, written), embedding = PUBLISHED[name]
    layer, vectors, positions = drawn(initialisation)
    for linear, expected in (
        (layer.mixer.query, inside(WIDTH, WIDTH)),
        (layer.mlp.up, inside(WIDTH, HIDDEN)),
        (layer.mixer.output, written(WIDTH, WIDTH)),
        (layer.mlp.down, written(HIDDEN, WIDTH)),
    ):
        kernel = np.asarray(linear.kernel[...])
        assert kernel.std() == pytest.approx(expected, rel=0.04) and abs(kernel.mean()) < 0.05 * expected
        if name in ("gla", "active-dormant"):  # uniform: bounded by the root of 3 deviations
            assert np.abs(kernel).max() <= 3**0.5 * expected * 1.0001
    assert np.std(vectors) == pytest.approx(embedding, rel=0.02)
    assert np.std(positions) == pytest.approx(embedding, rel=0.04)


def test_what_a_layer_prescribes_stays():
    plain, stated = (drawn(one, Mamba2(heads=2, key_dim=8))[0].mixer for one in (None, ACTIVE_DORMANT))
    for part in ("query", "output"):
        np.testing.assert_array_equal(getattr(plain, part).kernel[...], getattr(stated, part).kernel[...])


def test_a_model_built_later_has_its_own():
    before = drawn(None)[0].mixer.query.kernel[...]
    drawn(ACTIVE_DORMANT)
    np.testing.assert_array_equal(drawn(None)[0].mixer.query.kernel[...], before)
    with pytest.raises(UserError, match="positive"):
        Initialisation(gain=0.0)
