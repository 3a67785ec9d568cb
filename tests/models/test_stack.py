"""Depth: a scan over repeats is the same as layers written out, whatever is recomputed."""

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.layers import Attention, LinearAttention, ShortConvolution
from recollect.layers.mixer import Context
from recollect.layers.modules.mlp import SwiGLU
from recollect.models import FunctionalModel, LanguageModel, Stage, repeat
from recollect.models.functional import flatten
from recollect.pallas_kernels import dispatch
from tests.models.probes import PlaceProbe, error, functional

A, B = ShortConvolution(kernel=2), LinearAttention(heads=2, feature_dim=3)
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 23)
BASE, PARAMS = functional(width=8, stages=(Stage(pattern=(A, B), repeats=3), Stage(pattern=(A,))), mlp=SwiGLU(hidden=8))


def value_and_gradients(config):
    model = FunctionalModel(config, 23)

    def loss(params):
        logits = model.bind(params)(TOKENS)
        return jnp.mean(jnp.sin(logits)), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)


@pytest.mark.parametrize("fields", [{"unroll": True}, {"remat": "dots"}, {"remat": "full"}], ids=str)
def test_scan_unroll_and_remat_agree(fields):
    (_, logits), gradients = value_and_gradients(BASE.config)
    (_, found), found_gradients = value_and_gradients(chz.replace(BASE.config, **fields))
    assert error(found, logits) < 1e-6
    for (name, expected), leaf in zip(flatten(gradients).items(), flatten(found_gradients).values(), strict=True):
        assert error(leaf, expected) < 1e-5, name
        assert float(jnp.max(jnp.abs(expected))) > 0, name


def test_remat_recomputes():
    """What a backward pass keeps differs: counted in the program as forward work done twice."""

    def flops(remat):
        model = FunctionalModel(chz.replace(BASE.config, remat=remat, unroll=True), 23)
        run = jax.jit(jax.grad(lambda params: jnp.mean(jnp.sin(model.bind(params)(TOKENS)))))
        return run.lower(model.abstract_params()).cost_analysis()["flops"]

    assert flops("none") < flops("dots") < flops("full")


def test_layers_run_in_order_with_weights_of_their_own():
    model, params = functional(width=8, stages=(Stage(pattern=(A,), repeats=2), Stage(pattern=(A,))))
    one = FunctionalModel(LanguageModel(width=8, stages=repeat(A, depth=1)), 23)
    blocks = [jax.tree.map(lambda leaf, i=i: leaf[i], params["stack"]["stages"]["0"]["0"]) for i in range(2)]
    blocks.append(jax.tree.map(lambda leaf: leaf[0], params["stack"]["stages"]["1"]["0"]))
    x = jax.random.normal(jax.random.key(2), (1, 5, 8))
    expected = x
    for block in blocks:
        stack = {"stages": {"0": {"0": jax.tree.map(lambda leaf: leaf[None], block)}}}
        expected = one.bind({**params, "stack": stack}).stack(expected, Context()).hidden
    assert error(model.bind(params).stack(x, Context()).hidden, expected) < 1e-6
    assert error(blocks[0]["mixer"]["convolution"]["taps"], blocks[1]["mixer"]["convolution"]["taps"]) > 0.1


@pytest.mark.parametrize("unroll", [False, True])
def test_every_layer_knows_its_place(unroll):
    pattern = (PlaceProbe(), PlaceProbe(loses=True))
    config = LanguageModel(
        width=4, stages=(Stage(pattern=pattern, repeats=3), Stage(pattern=(PlaceProbe(),))), unroll=unroll
    )
    model = FunctionalModel(config, 5)
    params = jax.jit(model.init)(jax.random.key(0))
    stages = params["stack"]["stages"]
    np.testing.assert_array_equal(stages["0"]["0"]["mixer"]["index"], [0, 2, 4])
    np.testing.assert_array_equal(stages["0"]["1"]["mixer"]["index"], [1, 3, 5])
    np.testing.assert_array_equal(stages["1"]["0"]["mixer"]["index"], [6])
    noise = np.concatenate(
        [np.asarray(stages[s][p]["mixer"]["noise"]).reshape(-1) for s, p in (("0", "0"), ("0", "1"), ("1", "0"))]
    )
    assert len(set(noise)) == 21  # no two layers start alike
    out = jax.jit(lambda params: model.bind(params).hidden(jnp.zeros((1, 2), jnp.int32)))(params)
    assert float(out.metrics["index"]) == pytest.approx(3.0)  # the mean of 0 to 6
    assert float(out.losses["probe"]) == pytest.approx(30.0)  # over the three layers that have one


def test_repeat_cycles_through_a_pattern():
    assert repeat(A, B, depth=4) == (Stage(pattern=(A, B), repeats=2),)
    assert repeat(A, B, depth=5) == (Stage(pattern=(A, B), repeats=2), Stage(pattern=(A,)))
    assert repeat(A, B, depth=1) == (Stage(pattern=(A,)),)
    assert [type(mixer) for mixer in LanguageModel(stages=repeat(A, B, depth=5)).mixers] == [
        type(m) for m in (A, B, A, B, A)
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: repeat(A, depth=0), "depth=0"),
        (lambda: repeat(depth=3), "0 mixers"),
        (lambda: Stage(pattern=()), "at least one mixer"),
        (lambda: Stage(pattern=(A,), repeats=0), "repeats=0"),
        (lambda: LanguageModel(stages=()), "at least one stage"),
        (lambda: LanguageModel(stages=repeat(A, depth=1), width=0), "width=0"),
        (lambda: LanguageModel(stages=repeat(A, depth=1), embedding_dropout=1.0), r"embedding_dropout=1\.0"),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("backend, call", [("pallas_tpu", " pallas_call["), ("pallas_gpu", " custom_vmap_call[")])
def test_dots_keeps_what_kernels_computed(backend, call):
    """A step calls the kernels as often as without remat; "full" calls the forward ones once more."""

    def calls(remat):
        mixer = LinearAttention(heads=1, feature_dim=8) if backend == "pallas_tpu" else Attention(heads=1)
        config = LanguageModel(width=64, stages=repeat(mixer, depth=1), remat=remat, dtype="bfloat16")
        model = FunctionalModel(config, 8)
        tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)

        def loss(params, tokens):
            return jnp.sum(model.bind(params)(tokens))

        aimed = dispatch.aimed_at("gpu", "NVIDIA H100 80GB HBM3") if backend == "pallas_gpu" else dispatch.interpreted()
        with dispatch.preferred_backend(backend), aimed:
            return str(jax.make_jaxpr(jax.grad(loss))(model.abstract_params(), tokens)).count(call)

    none, dots, full = map(calls, ("none", "dots", "full"))
    assert 0 < none == dots < full
