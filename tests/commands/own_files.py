"""A user's file with a mixer, a task and experiments, and a module beside it."""

HELPERS = """
import jax.numpy as jnp

WIDTH = 8


def previous(x):
    return jnp.concatenate([0 * x[:, :1], x[:, :-1]], axis=1)
"""

MY_FILE = '''
import chz
import helpers
import jax
import jax.numpy as jnp

from recollect.data.synthetics import MQAR
from recollect.experiments.mqar import recall
from recollect.experiments.study import Study, grid
from recollect.layers import Attention, Mixer, MixerConfig, MixerOutput
from recollect.layers.mixer import Context, Traits
from recollect.layers.modules import parameter
from recollect.training.experiment import Experiment, Run

RUN = Run(steps=4, batch_size=8, steps_per_call=2)


@chz.chz(typecheck=True)
class Shift(MixerConfig):
    """The token before, scaled."""

    mistake: str = "none"

    @property
    def traits(self):
        return Traits(streams=False)

    def build(self, width, place, rngs):
        return ShiftMixer(self, width)


class ShiftMixer(Mixer):
    def __init__(self, config, width):
        self.config = config
        self.scale = parameter(jnp.ones(width), "d")

    def __call__(self, x, context=Context()):
        y = self.scale[...] * (x + helpers.previous(x))
        if self.config.mistake == "array":
            return y
        if self.config.mistake == "width":
            return MixerOutput(y[..., :4])
        if self.config.mistake == "raises":
            y = y + jnp.ones(3)
        if self.config.mistake == "losses":
            return MixerOutput(y, losses={"l2": y[0, 0]})
        return MixerOutput(y)


@chz.chz(typecheck=True)
class OtherKeys(MQAR):
    """A task of one's own."""

    def result_entries(self):
        return {"chance": 0.5}


DATA = OtherKeys(vocab_size=32, length=16, pairs=2, evaluation_examples=32)
good, bad = Shift(), Shift(mistake="array")


def shifted() -> Experiment:
    """The token before, on associative recall."""
    return recall("shifted", Shift(), width=helpers.WIDTH, data=DATA, run=RUN)


def seeds() -> Study:
    return Study((shifted(), recall("attention", Attention(), width=8, data=DATA, run=RUN)), grid({"run.seed": (0, 1)}))


def as_dict() -> dict[str, Experiment]:
    return {"one": shifted(), "two": shifted()}


def twice() -> list[Experiment]:
    return [shifted(), shifted()]


def sized(width) -> Experiment:
    return recall("sized", Shift(), width=width)


def nothing():
    return None


def fails() -> Experiment:
    return shifted().models
'''


def write(folder):
    """Writes the files into a folder."""
    (folder / "helpers.py").write_text(HELPERS)
    (folder / "my_file.py").write_text(MY_FILE)
