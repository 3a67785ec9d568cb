"""Attention transfer: Hedgehog's maps learn what softmax attention mixes."""

import chz
import jax
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.data.synthetics import MQAR
from recollect.layers import Attention, BaseConvolution, LinearAttention
from recollect.layers.modules import Hedgehog
from recollect.models import LanguageModel, converted, flatten, repeat
from recollect.training import Experiment, Run
from recollect.training.attention_transfer import transferred
from recollect.training.step import program_for

MODEL = LanguageModel(width=16, stages=repeat(BaseConvolution(kernel=3), Attention(heads=2), depth=2), mlp=None)
BEFORE = Experiment(
    name="a", model=MODEL, data=MQAR(vocab_size=32, length=16, pairs=3), run=Run(batch_size=8, steps_per_call=1)
)


def with_mixer(mixer):
    return chz.replace(BEFORE, model=chz.replace(MODEL, stages=repeat(BaseConvolution(kernel=3), mixer, depth=2)))


def test_the_loss_falls_and_only_the_maps_move():
    after = with_mixer(LinearAttention(heads=2, feature_map=Hedgehog()))
    teacher = jax.tree.map(lambda leaf: np.asarray(leaf) * 4, program_for(BEFORE).init(0)["params"])
    student = converted(teacher, MODEL, after.model, 32)
    moved, losses = transferred(teacher, BEFORE, student, after, steps=60, learning_rate=3e-2)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    new, old = flatten(moved), flatten(student)
    changed = {name.split(".")[-2] for name in old if not np.array_equal(new[name], old[name])}
    assert changed == {"query_features", "key_features"}


def test_a_model_without_maps_is_refused():
    after = with_mixer(LinearAttention(heads=2))
    params = program_for(BEFORE).init(0)["params"]
    student = converted(params, MODEL, after.model, 32)
    with pytest.raises(UserError, match="no layer of this model has any"):
        transferred(params, BEFORE, student, after, steps=1)
