"""NewMixer: say here what it computes.

h_t = a h_{t-1} + (1 - a) k_t v_t^T,   y_t = W q_t h_t        (a in (0, 1): one learned number per head)
"""

import chz
import jax
import jax.numpy as jnp

from recollect.experiments.mqar import recall
from recollect.layers.modules.linear import merge_heads, parameter
from recollect.layers.recurrent import RecurrentConfig, RecurrentMixer
from recollect.training.experiment import Experiment


@chz.chz(typecheck=True)
class NewMixer(RecurrentConfig):
    """A memory per head: the moving average of keys times values."""

    def build(self, width, place, rngs):
        return self.in_each_direction(NewMixerMixer, width, place, rngs)


class NewMixerMixer(RecurrentMixer):
    """The module: streams, packed documents, padding and the decode state are the base's."""

    def __init__(self, config, width, place, rngs):
        sizes = config.sizes(width)
        super().__init__(config, width, place, rngs, sizes)
        self.rate = parameter(jnp.linspace(2.0, 6.0, sizes.heads), "h")

    def mix(self, x, stream):
        q, k, v = self.heads(x, stream)  # (b, t, h, k), (b, t, h, k), (b, t, h, v)
        log_decay = jnp.broadcast_to(jax.nn.log_sigmoid(self.rate[...]), v.shape[:3])  # (b, t, h)
        v = v * jax.nn.sigmoid(-self.rate[...])[:, None].astype(v.dtype)  # 1 - a
        return self.output(merge_heads(stream.recurrence(q, k, v, log_decay=log_decay)))


def new_mixer() -> Experiment:
    """A convolution and NewMixer on associative recall."""
    return recall("new_mixer", NewMixer())
