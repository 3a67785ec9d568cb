"""Each law fails for a mixer that breaks it, and names the first input at which it does."""

import functools

import chz
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.layers import laws, streaming_laws
from recollect.layers.law_subject import require_refusal
from recollect.layers.mixer import Context, Cursor, Mixer, MixerConfig, MixerOutput, Traits, zero_padding
from recollect.layers.modules import parameter
from recollect.training.laws import same_as_on_one_device


@chz.chz(typecheck=True)
class Broken(MixerConfig):
    """The sum of the last two tokens, with a mistake."""

    mistake: str = "none"
    limit: int | None = None

    def build(self, width, place, rngs):
        return BrokenMixer(self, width)

    @property
    def traits(self):
        return Traits(maximum_length=self.limit)


class BrokenMixer(Mixer):
    def __init__(self, config, width):
        self.config = config
        self.scale = parameter(jnp.ones(width), "d")

    def __call__(self, x, context=Context()):
        state = self.init_state(*x.shape[:2])
        return self.extend(x, state, context)[0]

    def init_state(self, batch_size, max_length, dtype=jnp.float32):
        return jnp.zeros((batch_size, 1, self.scale.shape[0])), Cursor.start(batch_size)

    def extend(self, x, state, context=Context()):
        mistake = self.config.mistake
        last, cursor = state
        tokens, after = cursor.read(context, *x.shape[:2])
        if mistake != "padding":
            x = zero_padding(x, tokens)
        before = jnp.concatenate([last.astype(x.dtype), x[:, :-1]], axis=1)
        if mistake == "acausal":
            before = jnp.concatenate([x[:, 1:], x[:, :1]], axis=1)
        if mistake != "packing":
            before = jnp.where((tokens.positions == 0)[..., None], 0, before)
        y = self.scale[...].astype(x.dtype) * (x + before)
        if mistake == "own":
            y = y.at[:, 17].set(0)
        if mistake == "dtype":
            y = y.astype(jnp.float32)
        last = x[:, -1:] if mistake != "forgets" else 0 * x[:, -1:]
        if mistake != "state":
            last = last.astype(jnp.float32)
        return MixerOutput(y), (jnp.concatenate([last] * (2 if mistake == "grows" else 1), axis=1), after)


@functools.cache
def subject(mistake):
    return laws.Subject(Broken(mistake=mistake))


@pytest.mark.parametrize(
    ("mistake", "law", "said"),
    [
        (
            "acausal",
            laws.law_1_causal,
            "a change of input token 17 reaches an earlier output: first at row 0, token 16",
        ),
        ("own", laws.law_1_causal, "output token 17 does not depend on its own input"),
        (
            "forgets",
            streaming_laws.law_2_streaming,
            "extend with 1 token per call differs from the whole sequence: first",
        ),
        (
            "packing",
            laws.law_3_packing,
            "the document of segment 2 (row 0, tokens 5 to 35) differs from",
        ),
        ("padding", laws.law_4_padding, "NaN in padding"),
        (
            "grows",
            streaming_laws.law_6_state_size,
            "extend changes the state's [0] from float32(1, 1, 16) to float32(1, 2, 16)",
        ),
        ("dtype", laws.law_7_bf16, "bf16 inputs give outputs in float32"),
    ],
)
def test_a_broken_law_names_the_input(mistake, law, said):
    with pytest.raises(laws.LawBroken) as broken:
        law(subject(mistake))
    assert said in str(broken.value)


def test_laws_that_hold():
    for law in (laws.law_1_causal, laws.law_3_packing, laws.law_4_padding, laws.law_7_bf16):
        law(subject("none"))
    for name in ("law_2_streaming", "law_6_state_size", "law_11_streams_past_their_length"):
        streaming_laws.LAWS[name](subject("none"))


def test_a_maximum_length_is_enforced():
    with pytest.raises(laws.LawBroken, match="should raise UserError with '40', and raises nothing"):
        laws.law_14_maximum_length(laws.Subject(Broken(limit=40)))


def test_laws_are_asked_by_traits():
    everything = Traits()
    left_out = [law for law in laws.LAWS if laws.not_asked(law, everything)]
    assert left_out == ["law_14_maximum_length", "law_15_noncausal", "law_16_source"]
    assert laws.not_asked("law_15_noncausal", Traits(causal=False)) is None
    assert laws.not_asked("law_16_source", Traits(cross=True)) is None
    assert laws.not_asked("law_1_causal", Traits(causal=False)) == "traits.causal is False"
    for law in streaming_laws.LAWS:
        assert laws.not_asked(law, Traits(streams=False)) == "traits.streams is False"
    assert laws.not_asked("law_9_odd_lengths", Traits(maximum_length=64)) == (
        "takes 257 tokens, and traits.maximum_length is 64"
    )
    assert laws.not_asked("law_5_implementations_agree", Traits(maximum_length=64)) is None


def test_a_gradient_that_cancels_may_be_off_by_rounding_of_the_largest(monkeypatch):
    """The tolerance of law 8 has a floor of one unit of rounding of the model's largest gradient, and no more."""
    from recollect.training import laws as trained

    def steps(off):
        return np.ones(5), {"cancels": np.array([off]), "large": np.ones(3)}, {"a": np.ones(1)}

    monkeypatch.setattr(trained, "on_one_device", lambda mixer: steps(0.0))
    for off, holds in ((1e-7, True), (3e-7, False)):
        monkeypatch.setattr(trained, "five_steps", lambda mixer, mesh, off=off: steps(off))
        if holds:
            same_as_on_one_device(Broken(), trained.MESHES["data8"])
        else:
            with pytest.raises(laws.LawBroken, match=r"over a mesh of data 8, the gradient of \['cancels'\] is off by"):
                same_as_on_one_device(Broken(), trained.MESHES["data8"])


def test_a_law_that_should_refuse_says_what_came_instead():
    with pytest.raises(laws.LawBroken, match="should say 'room'"):
        require_refusal(lambda: (_ for _ in ()).throw(UserError("no")), "room")
