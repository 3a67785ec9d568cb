"""NewTask: say here what is asked.

tokens   a b c d a b c d        (the second half repeats the first)
label            b c d          (at each token of the second half but the last: the one that follows)
"""

from typing import NamedTuple

import chz
import jax
import jax.numpy as jnp

from recollect.configuration import UserError
from recollect.data.batch import Batch, DataConfig
from recollect.layers import Attention, BaseConvolution
from recollect.models import LanguageModel, repeat
from recollect.training.experiment import Experiment, Run
from recollect.training.optimizer import AdamW

TRAINING, EVALUATION = 1, 2
"""Folded into the seed: two streams of examples independent of each other."""


class Size(NamedTuple):
    """Examples of one size; `weight` is its share of training calls."""

    name: str
    length: int
    weight: float = 1.0


@chz.chz(typecheck=True)
class NewTask(DataConfig):
    """Sequences whose second half repeats the first, made on the device."""

    vocab_size: int = 64
    length: int = 32
    evaluation_examples: int = 512

    @chz.validate
    def _fits(self):
        if self.length < 4 or self.length % 2:
            raise UserError(f"length={self.length}: must be even and at least 4")

    made_on_device = True

    @property
    def vocabulary(self):
        return self.vocab_size

    @property
    def longest(self):
        return self.length

    @property
    def examples_per_slice(self):
        return self.evaluation_examples

    def result_entries(self):
        return {"chance": 1 / self.vocab_size}

    def batch_shapes(self, batch_size):
        return jax.eval_shape(lambda: self.train_batch(0, 0, self.train_slices()[0], batch_size))

    def train_slices(self):
        return (Size(str(self.length), self.length),)

    def evaluation_slices(self):
        return self.train_slices()

    def slice_for(self, seed, call_index):
        return self.train_slices()[0]

    def train_batch(self, seed, step, slice, batch_size):
        return self.sample(_key(seed, TRAINING, step), slice.length, batch_size)

    def evaluation_batch(self, seed, index, slice, batch_size):
        return self.sample(_key(seed, EVALUATION, index), slice.length, batch_size)

    def sample(self, key, length, batch_size):
        """Returns `batch_size` examples of `length` tokens; a pure function of the key."""
        half = length // 2
        first = jax.random.randint(key, (batch_size, half), 0, self.vocab_size)
        tokens = jnp.concatenate([first, first], axis=1)
        positions = jnp.broadcast_to(jnp.arange(half, length - 1), (batch_size, half - 1))
        return Batch(tokens, tokens[:, half + 1 :], positions, weights=jnp.ones(positions.shape))


def _key(seed, stream, number):
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), number)


def new_task() -> Experiment:
    """A convolution and attention on NewTask."""
    model = LanguageModel(width=32, stages=repeat(BaseConvolution(kernel=3), Attention(), depth=2), mlp=None)
    run = Run(steps=400, batch_size=64, steps_per_call=50, evaluate_every=100)
    return Experiment(name="new_task", model=model, data=NewTask(), optimizer=AdamW(learning_rate=1e-2), run=run)
