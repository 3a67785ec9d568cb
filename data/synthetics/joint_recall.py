"""Joint recall: keys have a value per context; which one does a key have in a context?

    tokens   C1 k2 v1 k1 v2   C2 k1 v3 k2 v4   C2 k1 v3   C1 k1
    label                                         v3         v2

All contexts hold the same keys, each in an order of its own; values may repeat. Questions differ.

Source: Zhan et al., Overcoming Long-Context Limitations of State-Space Models via Context-Dependent Sparse Attention
(arXiv 2507.00449), multi-query joint recall.
"""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.draws import distinct
from recollect.data.synthetics.orders import shuffled
from recollect.data.synthetics.task import Slice, SyntheticTask


@chz.chz(typecheck=True)
class JointSlice(Slice):
    """Examples of one size, length contexts (1 + 2 keys) + 3 queries - 1."""

    contexts: int = chz.field(validator=at_least(1))
    keys: int = chz.field(validator=at_least(1))
    queries: int = chz.field(validator=at_least(1))


@chz.chz(typecheck=True)
class JointRecall(SyntheticTask):
    """The value that a key has in a context.

    Attributes:
      vocab_size: token ids, in thirds: contexts, keys, values.
      contexts, keys: how many there are in an example, every key in every context.
      queries: pairs of a context and a key that are asked.
    """

    vocab_size: int = chz.field(default=256, validator=at_least(6))
    contexts: int = 4
    keys: int = 4
    queries: int = 8

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    def slice(self) -> JointSlice:
        return joint_slice(self.contexts, self.keys, self.queries)

    def scaled(self, slice: JointSlice, factor: int) -> JointSlice:
        """Returns the slice of `factor` times as many contexts and queries."""
        return joint_slice(factor * slice.contexts, slice.keys, factor * slice.queries)

    def check(self, slice: JointSlice) -> None:
        sizes = slice.contexts, slice.keys, slice.queries
        if slice.length != (length := joint_slice(*sizes).length):
            raise UserError(f"length={slice.length}: these contexts and queries take {length} tokens")
        if slice.queries > (most := slice.contexts * slice.keys):
            raise UserError(f"queries={slice.queries}: {slice.contexts} contexts of {slice.keys} keys have {most}")
        if self.vocab_size < (needed := 3 * max(slice.contexts, slice.keys)):
            raise UserError(f"vocab_size={self.vocab_size}: the contexts and keys need at least {needed}")

    def chance(self, slice: JointSlice) -> float:
        return 1 / (self.vocab_size - 2 * (self.vocab_size // 3))

    def spelling(self, token: int) -> str:
        third = self.vocab_size // 3
        kind = min(token // third, 2)
        return f"{'Ckv'[kind]}{token - kind * third}"

    def sample(self, key: Key[Array, ""], slice: JointSlice, batch_size: int) -> Batch:
        """Returns a batch with `queries` targets per row."""
        b, contexts, keys, queries = batch_size, slice.contexts, slice.keys, slice.queries
        of_contexts, of_keys, of_orders, of_values, of_queries = jax.random.split(key, 5)
        third = self.vocab_size // 3
        names = distinct(of_contexts, b, third, contexts)
        orders = shuffled(of_orders, b * contexts, keys).reshape(b, -1)
        listed = jnp.take_along_axis(third + distinct(of_keys, b, third, keys), orders, axis=1)
        values = jax.random.randint(of_values, (b, contexts * keys), 2 * third, self.vocab_size, jnp.int32)
        pairs = jnp.stack([listed, values], axis=2).reshape(b, contexts, 2 * keys)
        said = jnp.concatenate([names[:, :, None], pairs], axis=2).reshape(b, -1)
        asked = distinct(of_queries, b, contexts * keys, queries)
        parts = (names, asked // keys), (listed, asked), (values, asked)
        questions = jnp.stack([jnp.take_along_axis(tokens, index, axis=1) for tokens, index in parts], axis=2)
        tokens = jnp.concatenate([said, questions.reshape(b, -1)[:, :-1]], axis=1)
        positions = jnp.broadcast_to(said.shape[1] + 3 * jnp.arange(queries, dtype=jnp.int32) + 1, (b, queries))
        return Batch(tokens, questions[:, :, 2], positions, jnp.ones((b, queries), jnp.float32))


def joint_slice(contexts: int, keys: int, queries: int) -> JointSlice:
    """Returns the slice of three sizes."""
    length = contexts * (1 + 2 * keys) + 3 * queries - 1
    return JointSlice(length=length, contexts=contexts, keys=keys, queries=queries)
