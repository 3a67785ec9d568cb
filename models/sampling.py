"""How the next token is chosen: temperature, then the sets that top-k, top-p and min-p leave, then one draw per row."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from recollect.configuration import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; raises UserError for a value that cannot be.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_p: samples from the smallest set of tokens whose probabilities reach this sum (Holtzman et al. 2020).
      top_k: samples from this many likeliest tokens; None from all (Fan, Lewis & Dauphin 2018).
      min_p: leaves out tokens less likely than this share of the likeliest one's probability (Nguyen et al. 2024).
      repetition_penalty: divides positive logits of tokens that prompt or continuation hold already, and multiplies
        negative ones (Keskar et al. 2019, section 4.1).
      seed: same seed, same text.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for possible, reason in (
            (0 <= self.temperature < math.inf, f"temperature={self.temperature}: must be finite and not negative"),
            (0 < self.top_p <= 1, f"top_p={self.top_p}: must be in (0, 1]"),
            (self.top_k is None or self.top_k >= 1, f"top_k={self.top_k}: at least one token must be left to choose"),
            (0 <= self.min_p <= 1, f"min_p={self.min_p}: must be in [0, 1]"),
            (
                0 < self.repetition_penalty < math.inf,
                f"repetition_penalty={self.repetition_penalty}: must be finite and positive; 1 changes nothing",
            ),
            (0 <= self.seed < 2**63, f"seed={self.seed}: must be between 0 and 2^63 - 1"),
        ):
            if not possible:
                raise UserError(reason)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def has_filter(self) -> bool:
        """Whether some tokens are left out."""
        return self.top_p < 1 or self.top_k is not None or self.min_p > 0

    @property
    def has_penalty(self) -> bool:
        """Whether tokens seen before count less."""
        return self.repetition_penalty != 1

    def values(self, vocabulary: int) -> dict[str, Any]:
        """Returns the numbers that a compiled function takes as arguments, so that new ones compile nothing."""
        return {
            "temperature": jnp.float32(max(self.temperature, 1e-6)),
            "top_p": jnp.float32(self.top_p),
            "top_k": jnp.int32(vocabulary if self.top_k is None else min(self.top_k, vocabulary)),
            "min_p": jnp.float32(self.min_p),
            "repetition_penalty": jnp.float32(self.repetition_penalty),
        }

    def row_keys(self, prompts: Sequence[np.ndarray]) -> Key[Array, " b"]:
        """Returns one random key per prompt, the same in whatever batch it runs: of the seed and the prompt, and for
        equal prompts also of how many there were before."""
        before: Counter[int] = Counter()
        marks = []
        for prompt in prompts:
            digest = zlib.crc32(np.asarray(prompt, np.int32).tobytes())
            marks.append((digest, before[digest]))
            before[digest] += 1
        parts = jnp.asarray(np.array(marks, np.uint32))
        one = jax.random.key(self.seed)
        return jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(one, pair[0]), pair[1]))(parts)


def choose(
    keys: Key[Array, " b"],
    logits: Float[Array, "b z"],
    values: dict[str, Any],
    *,
    greedy: bool,
    filtered: bool,
    seen: Bool[Array, "b z"] | None = None,
) -> Int[Array, " b"]:
    """Returns one token per row.

    Args:
      keys: of each row, for this token.
      values: `Sampling.values`.
      greedy: take the likeliest token.
      filtered: whether top-k, top-p or min-p leave any token out.
      seen: the tokens that the repetition penalty applies to; None for no penalty.
    """
    if seen is not None:
        penalty = values["repetition_penalty"]
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / values["temperature"]
    draw = jax.vmap(jax.random.categorical)
    if not filtered:
        return draw(keys, logits).astype(jnp.int32)
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    ranked = jnp.where(jnp.arange(ranked.shape[-1]) < values["top_k"], ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    # Kept as long as the tokens before it do not reach top_p: the likeliest always stays.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < values["top_p"]) & (probabilities >= values["min_p"] * probabilities[:, :1])
    choice = draw(keys, jnp.where(kept, ranked, -jnp.inf))
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
