"""One layer: a mixer and an MLP, each added to the stream."""

from parts import MIXERS, MLP, norm_of
from torch import nn


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, mixer, model, index):
        super().__init__()
        width = model["width"]
        self.mixer_norm = norm_of(model["norm"], width)
        self.mixer = MIXERS[mixer["class"]](mixer, width, index)
        if model["mlp"] is not None:
            self.mlp_norm = norm_of(model["norm"], width)
            passes = model["mlp"]["class"] == "PassThrough"
            self.mlp = nn.Identity() if passes else MLP(model["mlp"], width)

    def forward(self, x, tokens, state):
        y, state = self.mixer(self.mixer_norm(x) * tokens.real[..., None], tokens, state)
        x = x + y
        return (x if getattr(self, "mlp", None) is None else x + self.mlp(self.mlp_norm(x))), state


BLOCKS: dict[str | None, type] = {None: Block}
"""Classes of blocks by the name of the config in the model's field `canon`."""
