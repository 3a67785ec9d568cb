"""Gated short convolutions. The state is the last inputs of each."""

from parts import Taps, mixer
from torch import nn
from torch.nn import functional as F

ACTIVATIONS = {"silu": F.silu, "none": lambda x: x}


@mixer
class ShortConvolution(nn.Module):
    """A short convolution by itself."""

    def __init__(self, config, width, index):
        super().__init__()
        self.config = config
        self.convolution = Taps(width, config["kernel"], config["bias"])

    def forward(self, x, tokens, state):
        y, state = self.convolution(x, tokens, state)
        return ACTIVATIONS[self.config["activation"]](y), state


@mixer
class BaseConvolution(nn.Module):
    """y = act(conv(u) + b) * act(W u + b') + u."""

    def __init__(self, config, width, index):
        super().__init__()
        self.activation = ACTIVATIONS[config["activation"]]
        self.projection = nn.Linear(width, width)
        self.convolution = Taps(width, config["kernel"], bias=True)

    def forward(self, x, tokens, state):
        y, state = self.convolution(x, tokens, state)
        return self.activation(y) * self.activation(self.projection(x)) + x, state


@mixer
class GatedConvolution(nn.Module):
    """[u1, u2] = W_in x + b_in,   y = W_out (silu(conv(u1)) * u2) + b_out; a third part may multiply u1."""

    def __init__(self, config, width, index):
        super().__init__()
        self.config = config
        inner = config["expansion"] * width // 2
        self.input = nn.Linear(width, (3 if config["input_gate"] else 2) * inner, bias=config["bias"])
        self.convolution = Taps(inner, config["kernel"])
        self.output = nn.Linear(inner, width, bias=config["bias"])

    def forward(self, x, tokens, state):
        u, gate, *rest = self.input(x).chunk(3 if self.config["input_gate"] else 2, -1)
        y, state = self.convolution(u * rest[0] if rest else u, tokens, state)
        return self.output(ACTIVATIONS[self.config["activation"]](y) * gate), state
