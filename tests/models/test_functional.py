"""A model as functions of plain dicts."""

import jax
import jax.numpy as jnp
import numpy as np

from recollect.layers import Landmark, LinearAttention
from recollect.layers.modules.feature_maps import Hedgehog
from recollect.layers.modules.mlp import GELU
from recollect.layers.modules.norms import LayerNorm
from recollect.layers.modules.positions import LearnedPositions
from recollect.models import FunctionalModel, LanguageModel, repeat
from recollect.models.functional import count, flatten, nest
from tests.models.probes import PlaceProbe, error, functional

FIELDS = {
    "width": 8,
    "stages": repeat(Landmark(block=2), LinearAttention(feature_map=Hedgehog()), PlaceProbe(), depth=3),
    "norm": LayerNorm(),
    "mlp": GELU(hidden=6, bias=True),
    "positions": LearnedPositions(maximum=20),
    "tied": False,
}
MODEL = FunctionalModel(LanguageModel(**FIELDS), 11)


def test_parameters_are_plain_named_fp32_arrays():
    params = jax.jit(MODEL.init)(jax.random.key(0))
    flat = flatten(params)
    assert {
        "embedding",
        "landmark",
        "positions.table",
        "head.kernel",
        "final_norm.gain",
        "stack.stages.0.0.mixer.query.kernel",
    } <= set(flat)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in flat.values())
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in flatten(MODEL.abstract_params()).items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in flat.items()
    }
    assert nest({tuple(name.split(".")): leaf for name, leaf in flat.items()}) == params
    assert count(params) == sum(leaf.size for leaf in flat.values())
    assert flat["embedding"].shape == flat["head.kernel"].shape[::-1] == (11, 8)
    assert "head.kernel" not in flatten(
        FunctionalModel(LanguageModel(width=8, stages=FIELDS["stages"]), 11).abstract_params()
    )


def test_initialisation_is_a_function_of_the_key():
    init = jax.jit(MODEL.init)
    first, again, other = init(jax.random.key(0)), init(jax.random.key(0)), init(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert float(jnp.max(jnp.abs(first["embedding"] - other["embedding"]))) > 0.01
    many = jax.jit(jax.vmap(MODEL.init))(jnp.stack([jax.random.key(1), jax.random.key(0)]))
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(first), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-6, atol=1e-7)


def test_bound_modules_have_the_parameters_given():
    model, params = functional(**FIELDS)
    tokens = jnp.arange(7)[None] % 11
    run = jax.jit(lambda params: model.bind(params)(tokens))
    base = run(params)
    for name, leaf in flatten(params).items():
        if "stages.0.2.mixer" in name:  # the probe's, which only reports
            continue
        changed = nest(
            {
                tuple(path.split(".")): 1.1 * leaf + 0.1 if path == name else value
                for path, value in flatten(params).items()
            }
        )
        assert error(run(changed), base) > 1e-5, name
    np.testing.assert_array_equal(run(params), base)  # nothing stuck to the module


def test_tags():
    decay, group, trainable = (flatten(MODEL.tags(name)) for name in ("decay", "group", "trainable"))
    assert set(decay) == set(flatten(MODEL.abstract_params()))
    undecayed = {name for name, value in decay.items() if not value}
    assert undecayed == {name for name in decay if name.endswith(("gain", "bias")) or name.endswith("mixer.index")}
    assert {name for name, value in group.items() if value != "default"} == {"stack.stages.0.2.mixer.index"}
    assert {name for name, value in trainable.items() if not value} == {"stack.stages.0.2.mixer.index"}
