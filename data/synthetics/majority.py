"""Majority: the token that a sequence has most often; among equals the one that came first.

    tokens   a b b a b
    label            b        (with labels="all" the majority so far, at every token)

With 2 classes and an odd length there are no equals.

Source: HazyResearch/zoology, data/circuits.py (majority, vocabulary majority).
"""

from __future__ import annotations

from typing import Literal

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from recollect.configuration import UserError
from recollect.data.batch import Batch
from recollect.data.synthetics.task import Slice, SyntheticTask


@chz.chz(typecheck=True)
class Majority(SyntheticTask):
    """The most frequent token.

    Attributes:
      classes: token ids, drawn independently and uniformly.
      labels: "last" labels the whole sequence, "all" every prefix.
    """

    classes: int = 2
    length: int = 31
    labels: Literal["all", "last"] = "last"

    @property
    def vocabulary(self) -> int:
        return self.classes

    def slice(self) -> Slice:
        return Slice(length=self.length)

    def scaled(self, slice: Slice, factor: int) -> Slice:
        length = factor * slice.length
        return chz.replace(slice, length=length + (self.classes == 2 and length % 2 == 0))  # odd: nothing ties

    def check(self, slice: Slice) -> None:
        if not 2 <= self.classes <= 1024:
            raise UserError(f"classes={self.classes}: must be 2 to 1024")
        if self.labels == "last" and self.classes == 2 and slice.length % 2 == 0:
            odd = f"{slice.length - 1} or {slice.length + 1}"
            raise UserError(f"length={slice.length}: two classes may tie at an even length; take {odd}")

    def chance(self, slice: Slice) -> float:
        return 1 / self.classes

    def sample(self, key: Key[Array, ""], slice: Slice, batch_size: int) -> Batch:
        """Returns a batch with one target per row, or per token."""
        tokens = jax.random.randint(key, (batch_size, slice.length), 0, self.classes, jnp.int32)
        of_class = tokens[:, :, None] == jnp.arange(self.classes)
        counts = jnp.cumsum(of_class, axis=1) if self.labels == "all" else jnp.sum(of_class, axis=1, keepdims=True)
        first = jnp.argmax(of_class, axis=1)[:, None]
        # Counts decide, and among equal ones the place of the first. Classes without any have a count of 0.
        targets = jnp.argmax(counts * (slice.length + 1) - first, axis=2).astype(jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(slice.length - targets.shape[1], slice.length), targets.shape)
        return Batch(tokens, targets, positions, jnp.ones(targets.shape, jnp.float32))
