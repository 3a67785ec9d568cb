"""Every mixer obeys one contract: the laws of layers/laws.py, training/laws.py and export/laws.py. A mixer exported by
`layers` is held to all that its traits ask for, in its default configuration and in the variants listed here; a law
that cannot hold is listed by name with its reason, which pytest prints."""

from __future__ import annotations

import dataclasses
import functools

import chz
import jax
import numpy as np
import pytest

from recollect import layers
from recollect.commands.check import all_laws
from recollect.layers.laws import Subject, not_asked
from recollect.layers.mixer import MixerConfig
from recollect.layers.modules import feature_maps
from recollect.layers.modules.lightning_indexer import LightningIndexer
from recollect.layers.modules.positions import LearnedPositions, Rotary
from recollect.layers.modules.score_biases import Alibi, RelativeBias
from recollect.layers.modules.selectors import MeanBlocks
from recollect.models.language_model import state_bytes

VARIANTS: dict[str, list[MixerConfig]] = {
    "Attention": [
        layers.Attention(heads=4, key_heads=2, positions=Rotary(), query_key_norm=True, bias=True),
        layers.Attention(heads=2, positions=LearnedPositions(maximum=300)),
        layers.Attention(heads=4, key_heads=2, positions=Alibi()),
        layers.Attention(heads=4, key_heads=2, positions=Rotary(), causal=False),
        layers.Attention(heads=4, key_heads=2, cross=True, query_key_norm=True),
    ],
    "SlidingWindow": [
        layers.SlidingWindow(window=7, heads=4, key_heads=2, positions=Rotary()),
        layers.SlidingWindow(window=0, heads=2, sinks="first", first=3),
        layers.SlidingWindow(window=5, heads=2, sinks="learned", positions=RelativeBias(buckets=4, distance=5)),
        layers.SlidingWindow(
            window=5, heads=2, sinks="first", first=3, positions=Rotary(fraction=0.5, layout="interleaved")
        ),
        layers.SlidingWindow(window=5, heads=2, positions=Alibi(), causal=False),
    ],
    "BlockSelection": [
        layers.BlockSelection(heads=4, key_heads=2, retrieve=MeanBlocks(block=4, top=2), positions=Rotary()),
        layers.BlockSelection(heads=2, retrieve=LightningIndexer(top=6, positions=Rotary()), positions=Alibi()),
    ],
    "NativeSparseAttention": [
        layers.NativeSparseAttention(
            heads=4,
            key_heads=2,
            compress="mean",
            block=4,
            stride=2,
            size=6,
            top=3,
            local=1,
            window=5,
            positions=Rotary(),
        )
    ],
    "PathAttention": [layers.PathAttention(heads=4, key_heads=2, rank=6, kernel=2)],
    "GatedAttention": [layers.GatedAttention(heads=4, key_heads=2, gate="head", positions=Rotary(fraction=0.5))],
    "DifferentialAttention": [layers.DifferentialAttention(heads=4, key_heads=2, positions=Rotary())],
    "ForgettingAttention": [layers.ForgettingAttention(heads=4, key_heads=2, query_key_norm=True)],
    "LatentAttention": [
        layers.LatentAttention(heads=2, rank=12, rotary_dim=0, query_rank=10, key_dim=6, value_dim=5),
        layers.LatentAttention(heads=4, rank=12, rotary_dim=4, positions=None),
    ],
    "RelativeConvolutionalAttention": [
        layers.RelativeConvolutionalAttention(heads=4, key_heads=2, shared_filters=False, maximum=300),
        layers.RelativeConvolutionalAttention(heads=2, relative=False, kernel=2, positions=Rotary()),
        layers.RelativeConvolutionalAttention(heads=2, window=6),
    ],
    "LinearAttention": [
        layers.LinearAttention(heads=2, feature_dim=3, chunk=16),
        layers.LinearAttention(heads=2, feature_map=feature_maps.EluPlusOne(), chunk=7, positions=Rotary()),
        layers.LinearAttention(heads=2, feature_map=feature_maps.Relu(), chunk=16, decay="retnet"),
        layers.LinearAttention(heads=2, feature_map=feature_maps.Exp(), chunk=64),
        layers.LinearAttention(heads=2, feature_map=feature_maps.Hedgehog(), chunk=16),
        layers.LinearAttention(
            heads=4, feature_map=feature_maps.Identity(), normalise=False, decay="retnet", output_norm=True, chunk=16
        ),
    ],
    "ShortConvolution": [
        layers.ShortConvolution(kernel=3, bias=True, activation="silu"),
        layers.ShortConvolution(kernel=1),
    ],
    "BaseConvolution": [
        layers.BaseConvolution(kernel=None, maximum_length=300, time="last", activation="silu"),
        layers.BaseConvolution(kernel=None, filter="explicit", maximum_length=300),
    ],
    "GatedConvolution": [layers.GatedConvolution(kernel=4, expansion=2, activation="none", input_gate=True)],
    "Hyena": [layers.Hyena(maximum_length=300, filter_order=16, heads=2, time="last", trains_times=True)],
    "SelectiveAttention": [
        layers.SelectiveAttention(heads=4, key_heads=2, select="repeats", positions=Rotary()),
        layers.SelectiveAttention(heads=2, share=0.2, threshold=0.5),
    ],
    "Landmark": [
        layers.Landmark(block=2, heads=2, positions=Rotary(), retrieve=1, window=3),
        layers.Landmark(block=4, heads=4, key_heads=2, positions=Rotary()),
        layers.Landmark(block=3, heads=2, positions=Rotary(), retrieve=2),
    ],
    "DeltaNet": [layers.DeltaNet(heads=4, key_heads=2, gate=True, negative_eigenvalues=True, kernel=None)],
    "GatedDeltaNet": [
        layers.GatedDeltaNet(heads=4, key_heads=2, key_dim=6, value_dim=3, negative_eigenvalues=True),
        layers.GatedDeltaNet(heads=1, kernel=1),
    ],
    "KimiDeltaAttention": [layers.KimiDeltaAttention(heads=1, key_dim=8, value_dim=5, kernel=None)],
    "DeltaProduct": [layers.DeltaProduct(heads=2, key_heads=1, steps=3, decays=False)],
    "LogLinearGatedDeltaNet": [layers.LogLinearGatedDeltaNet(heads=4, key_heads=2, levels=10, kernel=None)],
    "MesaNet": [layers.MesaNet(heads=1, key_dim=6, value_dim=3, kernel=None)],
    "TTTLinear": [layers.TTTLinear(heads=2, batch=5, positions=None)],
    "Titans": [layers.Titans(heads=2, batch=4, kernel=None, rate=3.0)],
    "Mamba2": [layers.Mamba2(heads=4, key_heads=2, key_dim=5, value_dim=3)],
    "GatedLinearAttention": [layers.GatedLinearAttention(heads=2, key_dim=5, kernel=3)],
    "RWKV6": [layers.RWKV6(heads=4, mix_rank=3, decay_rank=5)],
    "GatedSlotAttention": [layers.GatedSlotAttention(heads=2, slots=3, kernel=3)],
    "RGLRU": [layers.RGLRU(heads=2, channels=12, kernel=2)],
    "HGRN2": [layers.HGRN2(heads=4, kernel=4, lower_bounds=False)],
    "Retention": [layers.Retention(heads=2, positions=None, key_dim=5)],
    "Lightning": [
        layers.Lightning(form="transnormer", lrpe=True),
        layers.Lightning(heads=3, form="transnormer", decay="paper", key_dim=4, value_dim=5),
    ],
    "Mamba": [layers.Mamba(state=3, expansion=1, rank=5, kernel=1)],
    "Mamba3": [layers.Mamba3(heads=4, key_heads=2, key_dim=6, value_dim=3, turning=1.0)],
    "S4D": [layers.S4D(state=6)],
    "H3": [layers.H3(head_dim=4, state=6, taps=3)],
    "Hyena2": [layers.Hyena2(filter="SE", groups=4), layers.Hyena2(filter="MR", groups=2, taps=20, decay="strong")],
    "MLSTM": [layers.MLSTM(heads=2, cap=None)],
    "RWKV7": [layers.RWKV7(heads=4, rank=3)],
    "MixtureOfHeads": [
        layers.MixtureOfHeads(heads=4, shared=1, active=2, gates="paper", balance="code", positions=Rotary()),
        layers.MixtureOfHeads(heads=4, shared=4, active=0),
        layers.MixtureOfHeads(heads=4, shared=1, active=2, gates="ones", positions=Rotary()),
    ],
}

EXCEPTIONS: dict[tuple[str, str], str] = {}
"""(law, case) -> reason."""


def _cases() -> dict[str, MixerConfig]:
    cases = {cls.__name__: cls() for cls in layers.MIXERS}
    for cls in layers.MIXERS:
        cases |= {f"{cls.__name__}-{number}": config for number, config in enumerate(VARIANTS.get(cls.__name__, []), 1)}
    return cases


CASES = _cases()


@functools.lru_cache(maxsize=2)
def subject(case: str) -> Subject:
    return Subject(CASES[case], case)


QUICK = ("law_1_causal", "law_2_streaming", "law_3_packing", "law_5_implementations_agree")
"""Laws to which `make test` holds every mixer in its default configuration."""

COVERING = {
    "Attention",
    "Attention-4",
    "Attention-5",
    "SlidingWindow",
    "LinearAttention",
    "BaseConvolution",
    "Hyena",
    "Landmark",
    "MixtureOfHeads",
    "GatedDeltaNet",
}
"""Mixers that `make test` holds to every law: between them they have every trait."""


def _marks(law: str, case: str) -> list[pytest.MarkDecorator]:
    """Returns the mark of `make test-more` for cases that `make test` leaves to it."""
    quick = case in COVERING or (law in QUICK and "-" not in case)
    return [] if quick else [pytest.mark.more]


@pytest.mark.parametrize(
    ("law", "case"),
    # The laws of a case one after another: they share its compiled programs.
    [pytest.param(law, case, id=f"{law}-{case}", marks=_marks(law, case)) for case in CASES for law in all_laws()],
)
def test_law(law, case):
    reason = EXCEPTIONS.get((law, case)) or not_asked(law, CASES[case].traits)
    if reason:
        pytest.skip(f"{law} cannot hold for {case}: {reason}")
    all_laws()[law](subject(case))
    if law == "law_6_state_size":  # accounting takes a state's bytes from its shapes
        measured = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(subject(case).init_state(1, 32)))
        assert state_bytes(jax.eval_shape(lambda: subject(case).init_state(1, 32))) == measured


def test_every_law_of_every_mixer_runs_somewhere():
    """`make test` leaves no mixer out of the quick laws, and `make test-more` no law of any case."""
    cases = test_law.pytestmark[0].args[1]
    assert {case.values for case in cases} == {(law, case) for law in all_laws() for case in CASES}
    marks = {case.values: {mark.name for mark in case.marks} for case in cases}
    names = {cls.__name__ for cls in layers.MIXERS}
    for law, case in marks:
        quick = case in COVERING or (law in QUICK and case in names)
        assert marks[law, case] == (set() if quick else {"more"})


def test_the_covering_mixers_have_every_trait():
    def kinds(cases):
        traits = [dataclasses.asdict(CASES[case].traits) for case in cases]
        return {(name, value is None, value is False) for each in traits for name, value in each.items()}

    assert len(COVERING) == 10 and kinds(COVERING) == kinds(CASES)


def test_every_exported_mixer_is_here():
    assert {type(config) for config in CASES.values()} == set(layers.MIXERS)
    assert all(chz.is_chz(config) for config in CASES.values())
