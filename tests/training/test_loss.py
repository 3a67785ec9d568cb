"""What a batch gives to the model: a source, and labels that the model does not see."""

import jax
import jax.numpy as jnp
import pytest

from recollect.configuration import UserError
from recollect.data.batch import Batch
from recollect.layers import Attention
from recollect.models import Encoder, FunctionalModel, LanguageModel, repeat
from recollect.training.loss import Loss, losses

TOKENS = jnp.ones((2, 6), jnp.int32)
BOTH_WAYS = repeat(Attention(causal=False), depth=1)


def shape_of_loss(config: LanguageModel, batch: Batch):
    model = FunctionalModel(config, 9)
    run = lambda params, batch: losses(model.bind(params), batch, batch.weights, Loss())[0].loss  # noqa: E731
    return jax.eval_shape(run, model.abstract_params(), batch).shape


def test_a_batchs_source_reaches_the_encoder():
    config = LanguageModel(
        width=8, stages=repeat(Attention(), Attention(cross=True), depth=2), encoder=Encoder(stages=BOTH_WAYS)
    )
    batch = Batch(TOKENS, TOKENS, None, jnp.ones((2, 6)))
    with pytest.raises(UserError, match="reads a source"):
        shape_of_loss(config, batch)
    assert shape_of_loss(config, Batch(**{**vars(batch), "source": TOKENS[:, :4]})) == (2, 6)


def test_the_next_token_is_no_label_for_a_model_that_sees_it():
    config = LanguageModel(width=8, stages=BOTH_WAYS)
    with pytest.raises(UserError, match="causal=False sees"):
        shape_of_loss(config, Batch(TOKENS, TOKENS, None, jnp.ones((2, 6))))
    places = jnp.asarray([[1, 4], [0, 5]])
    assert shape_of_loss(config, Batch(TOKENS, TOKENS[:, :2], places, jnp.ones((2, 2)))) == (2, 2)
