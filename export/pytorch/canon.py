"""Canon layers: residual short convolutions before the mixer (a), on queries, keys and values (b), before the MLP (c),
and inside of it (d). The state is the mixer's, and the last inputs of each."""

from block import BLOCKS, Block
from parts import Taps
from torch import nn


class Residual(Taps):
    """y + conv(y). Its block hands it the tokens and the state, of which norms and linear maps know nothing."""

    tokens = state = None

    def forward(self, y):
        convolved, self.state = super().forward(y, self.tokens, self.state)
        return y + convolved


class ConvolvedNorm(nn.Module):
    """A norm, convolved."""

    def __init__(self, norm, width, kernel):
        super().__init__()
        self.norm, self.convolution = norm, Residual(width, kernel)

    def forward(self, x):
        return self.convolution(self.norm(x))


class ConvolvedLinear(nn.Linear):
    """A linear map, convolved."""

    def __init__(self, linear, kernel):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.convolution = Residual(linear.out_features, kernel)

    def forward(self, x):
        return self.convolution(super().forward(x))


class CanonBlock(Block):
    """A block with convolutions at the places that the model's config names."""

    def __init__(self, mixer, model, index):
        super().__init__(mixer, model, index)
        places, kernel, width = model["canon"]["places"], model["canon"]["kernel"], model["width"]
        for place, name in (("a", "mixer_norm"), ("c", "mlp_norm")):
            if place in places:
                setattr(self, name, ConvolvedNorm(getattr(self, name), width, kernel))
        inside = [(self.mixer, name) for name in ("query", "key", "value") if "b" in places]
        inside += [(self.mlp, name) for name in ("gate", "up") if "d" in places]
        for module, name in inside:
            if getattr(module, name, None) is not None:
                setattr(module, name, ConvolvedLinear(getattr(module, name), kernel))

    def forward(self, x, tokens, state):
        convolutions = [module for module in self.modules() if isinstance(module, Residual)]
        inner, *states = state or [None] * (1 + len(convolutions))
        for convolution, before in zip(convolutions, states, strict=True):
            convolution.tokens, convolution.state = tokens, before
        x, inner = super().forward(x, tokens, inner)
        after = [inner, *(convolution.state for convolution in convolutions)]
        for convolution in convolutions:
            convolution.tokens = convolution.state = None
        return x, after


BLOCKS["Canon"] = CanonBlock
