"""Sharding, Muon and weight decay of every kind of parameter, as attribute names decided them before parameters carried
the letters of their dimensions."""

import chz
import jax.numpy as jnp
import pytest

from recollect import layers
from recollect.layers import Mixer, MixerConfig
from recollect.layers.modules import LayerNorm, LearnedPositions, SwiGLU, parameter
from recollect.models import FunctionalModel, LanguageModel, flatten, repeat
from recollect.training.experiment import Mesh
from recollect.training.muon import Muon
from recollect.training.sharding import SPLIT, SPLIT_BESIDE, make_mesh, params_sharding, spec_of
from tests.layers.test_mixer_laws import CASES

EXPECTED = {
    "embedding": ("tensor fsdp", False, True),
    "final_norm.bias": ("-", False, False),
    "final_norm.gain": ("-", False, False),
    "head.kernel": ("fsdp tensor", False, True),
    "landmark": ("-", False, True),
    "layer.mixer.by_distance": ("fsdp tensor -", False, False),
    "layer.mixer.content": ("tensor -", False, False),
    "layer.mixer.convolution.bias": ("-", False, False),
    "layer.mixer.convolution.taps": ("- tensor", False, True),
    "layer.mixer.direction.convolution.taps": ("- tensor", False, True),
    "layer.mixer.direction.kernel": ("fsdp tensor", True, True),
    "layer.mixer.down.kernel": ("fsdp -", True, True),
    "layer.mixer.filter.down.bias": ("-", False, False),
    "layer.mixer.filter.down.kernel": ("fsdp tensor", True, True),
    "layer.mixer.filter.frequency": ("-", False, False),
    "layer.mixer.filter.layers.0.bias": ("-", False, False),
    "layer.mixer.filter.layers.0.kernel": ("- -", False, False),
    "layer.mixer.filter.layers.1.bias": ("-", False, False),
    "layer.mixer.filter.layers.1.kernel": ("- -", False, False),
    "layer.mixer.filter.layers.2.bias": ("-", False, False),
    "layer.mixer.filter.layers.2.kernel": ("- -", False, False),
    "layer.mixer.filter.output": ("fsdp tensor", False, False),
    "layer.mixer.filter.taps": ("fsdp tensor", False, True),
    "layer.mixer.filter.up.bias": ("-", False, False),
    "layer.mixer.filter.up.kernel": ("- -", True, True),
    "layer.mixer.forget.bias": ("-", False, False),
    "layer.mixer.forget.kernel": ("fsdp tensor", True, True),
    "layer.mixer.gate.projection.kernel": ("fsdp tensor", True, True),
    "layer.mixer.input.bias": ("-", False, False),
    "layer.mixer.input.kernel": ("fsdp tensor", True, True),
    "layer.mixer.key.bias": ("-", False, False),
    "layer.mixer.key.convolution.bias": ("-", False, False),
    "layer.mixer.key.convolution.taps": ("- tensor", False, True),
    "layer.mixer.key.kernel": ("fsdp tensor", True, True),
    "layer.mixer.key_features.bias": ("tensor -", False, False),
    "layer.mixer.key_features.kernel": ("tensor - -", True, True),
    "layer.mixer.key_norm.gain": ("-", False, False),
    "layer.mixer.key_up.kernel": ("fsdp tensor", True, True),
    "layer.mixer.kind_router.kernel": ("fsdp -", False, True),
    "layer.mixer.norm.gain": ("-", False, False),
    "layer.mixer.of_distance": ("fsdp tensor", False, False),
    "layer.mixer.output.bias": ("-", False, False),
    "layer.mixer.output.kernel": ("tensor fsdp", True, True),
    "layer.mixer.output_norm.gain": ("-", False, False),
    "layer.mixer.positions.buckets": ("- tensor", False, False),
    "layer.mixer.positions.table": ("- fsdp", False, True),
    "layer.mixer.projection.bias": ("-", False, False),
    "layer.mixer.projection.kernel": ("fsdp tensor", True, True),
    "layer.mixer.query.bias": ("-", False, False),
    "layer.mixer.query.convolution.bias": ("-", False, False),
    "layer.mixer.query.convolution.taps": ("- tensor", False, True),
    "layer.mixer.query.kernel": ("fsdp tensor", True, True),
    "layer.mixer.query_down.kernel": ("fsdp -", True, True),
    "layer.mixer.query_features.bias": ("tensor -", False, False),
    "layer.mixer.query_features.kernel": ("tensor - -", True, True),
    "layer.mixer.query_norm.gain": ("-", False, False),
    "layer.mixer.routed_router.kernel": ("fsdp -", False, True),
    "layer.mixer.shared_key.kernel": ("fsdp -", True, True),
    "layer.mixer.shared_router.kernel": ("fsdp -", False, True),
    "layer.mixer.sinks": ("-", False, False),
    "layer.mixer.skip": ("-", False, False),
    "layer.mixer.start": ("", False, False),
    "layer.mixer.strength.bias": ("-", False, False),
    "layer.mixer.strength.kernel": ("fsdp tensor", True, True),
    "layer.mixer.value.bias": ("-", False, False),
    "layer.mixer.value.convolution.bias": ("-", False, False),
    "layer.mixer.value.convolution.taps": ("- tensor", False, True),
    "layer.mixer.value.kernel": ("fsdp tensor", True, True),
    "layer.mixer.value_up.kernel": ("fsdp tensor", True, True),
    "layer.mixer.vectors": ("- -", False, False),
    "layer.mixer_norm.bias": ("-", False, False),
    "layer.mixer_norm.gain": ("-", False, False),
    "layer.mlp.down.bias": ("-", False, False),
    "layer.mlp.down.kernel": ("tensor fsdp", True, True),
    "layer.mlp.gate.bias": ("-", False, False),
    "layer.mlp.gate.kernel": ("fsdp tensor", True, True),
    "layer.mlp.up.bias": ("-", False, False),
    "layer.mlp.up.kernel": ("fsdp tensor", True, True),
    "layer.mlp_norm.bias": ("-", False, False),
    "layer.mlp_norm.gain": ("-", False, False),
    "positions.table": ("- fsdp", False, True),
    # parameter: (mesh axes of its dimensions, whether Muon takes it as a matrix, whether it decays)
}
"""Hedgehog's bias alone is split otherwise: it was whole, and follows its kernel now."""

REPEATS = 2
NAMED = (
    *(layers.Attention, layers.BlockSelection, layers.DifferentialAttention, layers.ForgettingAttention),
    *(layers.GatedAttention, layers.Landmark, layers.LatentAttention, layers.MixtureOfHeads, layers.PathAttention),
    *(layers.RelativeConvolutionalAttention, layers.SlidingWindow, layers.LinearAttention, layers.BaseConvolution),
    *(layers.GatedConvolution, layers.Hyena, layers.ShortConvolution),
)
"""The mixers of the table; others have had letters from the start."""
NEWER = ("layer.mixer.selector.", "layer.mixer.filter.embedding")
"""Parameters of these mixers that have, too."""


def model_of(mixer: MixerConfig) -> FunctionalModel:
    config = LanguageModel(
        width=16,
        stages=repeat(mixer, depth=REPEATS),
        mlp=SwiGLU(hidden=24, bias=True),
        norm=LayerNorm(),
        positions=LearnedPositions(maximum=32),
        tied=False,
    )
    return FunctionalModel(config, 24)


@pytest.fixture(scope="module")
def models() -> dict[str, FunctionalModel]:
    return {case: model_of(mixer) for case, mixer in CASES.items() if not mixer.traits.cross}


def test_sharding_muon_and_decay_are_those_of_the_names(models):
    mesh = make_mesh(Mesh(fsdp=2, tensor=2))
    seen = set()
    for case, model in models.items():
        if type(CASES[case]) not in NAMED:
            continue
        shardings = flatten(params_sharding(model.abstract_params(), model.tags("dims"), mesh))
        labels, decays = flatten(Muon().labels(model)), flatten(model.tags("decay"))
        for path, sharding in shardings.items():
            name = path.replace("stack.stages.0.0.", "layer.")
            if name.startswith(NEWER):
                continue
            axes, matrix, decay = EXPECTED[name]
            stacked = ("-",) if name.startswith("layer.") else ()
            assert tuple(axis or "-" for axis in sharding.spec) == (*stacked, *axes.split()), (case, path)
            assert (labels[path] == "matrix", decays[path]) == (matrix, decay), (case, path)
            seen.add(name)
    assert seen == set(EXPECTED)


def test_every_dimension_has_a_letter_with_a_rule(models):
    for case, model in models.items():
        shapes = flatten(model.abstract_params())
        for path, dims in flatten(model.tags("dims")).items():
            rank = shapes[path].ndim - path.startswith("stack.")  # repeats of a layer have no letter
            assert len(dims.split()) == rank, (case, path)
            assert {word[0] for word in dims.split()} <= SPLIT.keys() | SPLIT_BESIDE.keys(), (case, path)


@chz.chz(typecheck=True)
class NewMixer(MixerConfig):
    """Has a parameter whose first dimension counts something new."""

    def build(self, width, place, rngs):
        return NewMixerModule(width)


class NewMixerModule(Mixer):
    def __init__(self, width: int):
        self.memory = parameter(jnp.zeros((3, width)), "m d")


def test_a_letter_without_a_rule_is_an_error_and_not_replicated():
    model, mesh = model_of(NewMixer()), make_mesh(Mesh(fsdp=2))
    with pytest.raises(ValueError, match=r"'m d'.*no sharding rule for 'm'.*training/sharding\.py"):
        params_sharding(model.abstract_params(), model.tags("dims"), mesh)


@pytest.mark.parametrize("dims", ["d", "b d f", ""])
def test_letters_that_do_not_fit_the_rank_are_an_error(dims):
    with pytest.raises(ValueError, match=f"dims='{dims}' has . words for the 2 dimensions"):
        parameter(jnp.zeros((3, 4)), dims)


def test_every_parameter_must_state_its_letters():
    with pytest.raises(TypeError, match="dims"):
        parameter(jnp.zeros(3))


def test_an_axis_splits_one_dimension():
    mesh = make_mesh(Mesh(fsdp=2, tensor=2))
    assert tuple(spec_of("d d", (4, 4), mesh)) == ("fsdp", None)
    assert tuple(spec_of("hk g", (4, 4), mesh)) == ("tensor", None)
    assert tuple(spec_of("t d f", (4, 4, 4), mesh)) == (None, "fsdp", "tensor")
    assert tuple(spec_of("", (), mesh)) == ()
