"""Rates of rotary positions for contexts longer than those of training, as published configs state them.

With r rotated dimensions and base b, pair i turns by rate_i = b^(-2i/r) a position, once every 2 pi / rate_i positions.
A factor s is the new context's length over that of training.
"""

from __future__ import annotations

import abc
import math

import chz
import numpy as np

from recollect.configuration import Config, UserError, at_least, requires

_longer = requires(lambda value: value >= 1, "a context grows by a factor of at least 1")


@chz.chz(typecheck=True)
class RotaryScaling(Config):
    """Base of the scalings.

    Attributes:
      factor: s, of the context's length.
    """

    factor: float = chz.field(default=8.0, validator=_longer)

    @abc.abstractmethod
    def rates(self, base: float, rotated: int) -> np.ndarray:
        """Returns the angle per position of each pair, (rotated // 2,) fp32."""

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by, on queries and on keys."""
        return 1.0


@chz.chz(typecheck=True)
class LinearScaling(RotaryScaling):
    """rate_i / s: positions are interpolated (Chen et al. 2023, equation 3)."""

    def rates(self, base: float, rotated: int) -> np.ndarray:
        return _rates(base, rotated, self.factor)


@chz.chz(typecheck=True)
class NTKScaling(RotaryScaling):
    """Rates of the base b s^(r/(r-2)): the fastest pair keeps its rate, the slowest turns s times slower (bloc97 2023;
    Peng et al. 2023, definition 1)."""

    def rates(self, base: float, rotated: int) -> np.ndarray:
        if rotated < 4:
            raise UserError(f"NTK scaling needs at least 4 rotated dimensions of a head; got {rotated}")
        return _rates(base * self.factor ** (rotated / (rotated - 2)), rotated, 1.0)


@chz.chz(typecheck=True)
class _OfTraining(RotaryScaling):
    """Base of scalings that keep rates of pairs that turned often in training.

    Attributes:
      original: tokens of a context in training.
    """

    original: int = chz.field(default=4096, validator=at_least(1))

    @abc.abstractmethod
    def kept(self, base: float, rotated: int) -> np.ndarray:
        """Returns how much of each pair's rate is kept, 0 to 1."""

    def rates(self, base: float, rotated: int) -> np.ndarray:
        kept = self.kept(base, rotated)
        return (_rates(base, rotated, self.factor) * (1 - kept) + _rates(base, rotated, 1.0) * kept).astype(np.float32)


@chz.chz(typecheck=True)
class YaRN(_OfTraining):
    """Pairs that turned `fast` times or more in training keep their rate, those that turned `slow` times or less turn s
    times slower, linear in the pair's index between; scores grow by amplitude^2 (Peng et al. 2023, section 3.4; the
    bounds are rounded to whole pairs, as in the published code).

    Attributes:
      attention_factor: the amplitude; None: 0.1 ln(s) + 1.
    """

    fast: float = 32.0
    slow: float = 1.0
    attention_factor: float | None = None

    @property
    def amplitude(self) -> float:
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def kept(self, base: float, rotated: int) -> np.ndarray:
        def pair(turns: float) -> float:
            """The pair, as a real number, that turned so often in training."""
            return rotated * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(math.floor(pair(self.fast)), 0), min(math.ceil(pair(self.slow)), rotated - 1)
        return 1 - np.clip((np.arange(rotated // 2) - low) / max(high - low, 1e-3), 0, 1)


@chz.chz(typecheck=True)
class Llama3Scaling(_OfTraining):
    """Pairs that turned more than `fast` times in training keep their rate, those that turned less than `slow` times
    turn s times slower, linear in the number of turns between (Llama 3.1's code)."""

    fast: float = 4.0
    slow: float = 1.0
    original: int = chz.field(default=8192, validator=at_least(1))

    def kept(self, base: float, rotated: int) -> np.ndarray:
        turns = self.original * _rates(base, rotated, 1.0).astype(np.float64) / (2 * math.pi)
        return np.clip((turns - self.slow) / (self.fast - self.slow), 0, 1)


def _rates(base: float, rotated: int, factor: float) -> np.ndarray:
    return (base ** (-np.arange(0, rotated, 2) / rotated) / factor).astype(np.float32)
