"""Hyena, order 2. The state is the last inputs of the short convolution and all of the long one: an implicit filter is
no recurrence of fixed size."""

import math

import torch
from parts import Taps, append, mixer
from torch import nn


class SineFilter(nn.Module):
    """taps(i) = W4 sin(w (W3 sin(w (W2 sin(w (W1 e(i) + b1)) + b2)) + b3)) * exp(-time(i) |decay|) per channel."""

    def __init__(self, config, channels):
        super().__init__()
        self.maximum, self.last, order = config["maximum_length"], config["time"] == "last", config["filter_order"]
        self.embedding = nn.Parameter(torch.empty(self.maximum, 3)) if config["trains_times"] else None
        self.frequency = nn.Parameter(torch.ones(order))
        self.layers = nn.ModuleList(nn.Linear(inputs, order) for inputs in (3, order, order))
        self.output = nn.Parameter(torch.empty(order, channels))

    def forward(self):
        """Returns all taps, (maximum, channels)."""
        index = torch.arange(self.maximum, dtype=torch.float32, device=self.output.device)
        time = index / (max(1, self.maximum - 1) if self.last else self.maximum)
        angles = 2e-4 * math.pi * (index / self.maximum)
        x = torch.stack([time, angles.cos(), -angles.sin()], -1) if self.embedding is None else self.embedding
        for layer in self.layers:
            x = (self.frequency * layer(x)).sin()
        slowest, fastest = math.log(0.01) / 1.5, math.log(0.01) / 0.3
        decay = torch.linspace(slowest, fastest, self.output.shape[1], device=x.device).abs()
        return x @ self.output * (-time[:, None] * decay).exp()


def last_outputs(inputs, taps, number):
    """Returns y_i = sum_j taps[j] inputs_{i-j} (b, number, f) at the last inputs (b, s, f)."""
    length = inputs.shape[1]
    taps = taps[:length]
    if number == 1:
        return (inputs[:, length - len(taps) :].flip(1) * taps).sum(1, keepdim=True)
    spectrum = torch.fft.rfft(inputs, 2 * length, dim=1) * torch.fft.rfft(taps, 2 * length, dim=0)
    return torch.fft.irfft(spectrum, 2 * length, dim=1)[:, length - number : length]


@mixer
class Hyena(nn.Module):
    """[x1, x2, v] = conv(W_in u + b_in),   z = x1 * v,   y = W_out (x2 * (filter * z + skip z)) + b_out."""

    def __init__(self, config, width, index):
        super().__init__()
        self.maximum, self.heads = config["maximum_length"], config["heads"]
        channels = width // self.heads
        self.input, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.convolution = Taps(3 * width, config["kernel"], bias=True)
        self.filter, self.skip = SineFilter(config, channels), nn.Parameter(torch.empty(channels))

    def forward(self, x, tokens, state):
        if int(tokens.positions.max()) >= self.maximum:
            raise ValueError(f"Hyena's filter has {self.maximum} taps, and there are more tokens")
        state = state or {"short": None, "past": x[:, :0], "taps": self.filter().repeat(1, self.heads)}
        projected, short = self.convolution(self.input(x), tokens, state["short"])
        x1, x2, v = projected.chunk(3, -1)
        z = x1 * v * tokens.real[..., None]  # of biases, at padding
        past = append(state["past"], z, tokens.real)
        y = last_outputs(past, state["taps"], x.shape[1]) + self.skip.repeat(self.heads) * z
        return self.output(x2 * y), {"short": short, "past": past[:, -self.maximum :], "taps": state["taps"]}
