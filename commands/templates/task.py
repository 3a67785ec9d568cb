"""NewTask: say here what is asked.

tokens   a b c d a b c d        (the second half repeats the first)
label            b c d          (at each token of the second half but the last: the one that follows)
"""

import chz
import jax
import jax.numpy as jnp

from recollect.configuration import UserError
from recollect.data.batch import Batch
from recollect.data.synthetics.task import Slice, SyntheticTask
from recollect.layers import Attention, BaseConvolution
from recollect.models import LanguageModel, repeat
from recollect.training.experiment import Experiment, Run
from recollect.training.optimizer import AdamW


@chz.chz(typecheck=True)
class NewTask(SyntheticTask):
    """Sequences whose second half repeats the first."""

    vocab_size: int = 64
    length: int = 32
    evaluation_examples: int = 512
    extrapolation: tuple[int, ...] = (2, 4)

    @property
    def vocabulary(self):
        return self.vocab_size

    def check(self, slice):
        if slice.length < 4 or slice.length % 2:
            raise UserError(f"length={slice.length}: must be even and at least 4")

    def slice(self):
        return Slice(length=self.length)

    def chance(self, slice):
        return 1 / self.vocab_size

    def sample(self, key, slice, batch_size):
        """Returns `batch_size` examples; a pure function of the key."""
        half = slice.length // 2
        first = jax.random.randint(key, (batch_size, half), 0, self.vocab_size)
        tokens = jnp.concatenate([first, first], axis=1)
        positions = jnp.broadcast_to(jnp.arange(half, slice.length - 1), (batch_size, half - 1))
        return Batch(tokens, tokens[:, half + 1 :], positions, weights=jnp.ones(positions.shape))


def new_task() -> Experiment:
    """A convolution and attention on NewTask."""
    model = LanguageModel(width=32, stages=repeat(BaseConvolution(kernel=3), Attention(), depth=2), mlp=None)
    run = Run(steps=400, batch_size=64, steps_per_call=50, evaluate_every=100)
    return Experiment(name="new_task", model=model, data=NewTask(), optimizer=AdamW(learning_rate=1e-2), run=run)
