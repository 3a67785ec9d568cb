"""Depo (PhysicsLM4): nodes on a cycle, given by its edges in random order; which node is k steps ahead?

    tokens   b c  a b  d a  c d   3 a d  1 c d       (edges, then questions: k, a node)
    label                           d      d         (here with words of one token)

A node's name is a word of one token or several.

Source: Allen-Zhu, Physics of Language Models 4.1 (arXiv 2512.17351), Depo; PhysicsLM4. Depo1 has 225 to 375 nodes, 8
hops and words of 1 or 2 of 50 tokens; Depo2 75 to 125 nodes, 16 hops and words of 5 to 7 of 3 tokens. Words here have
one length. As there, training draws the number of nodes n with weight 1 / (n + sqrt N), and `at_full_size` gives the
slice of exactly N nodes that is evaluated.
"""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.draws import distinct
from recollect.data.synthetics.orders import shuffled
from recollect.data.synthetics.task import Slice, SyntheticTask

_FIRST = 1
"""Token 0 fills the beginning where there are fewer nodes than N."""


@chz.chz(typecheck=True)
class DepoSlice(Slice):
    """Examples of `smallest` to `nodes` nodes; the length follows from them (`Depo.sized`)."""

    nodes: int = chz.field(validator=at_least(2))
    smallest: int = chz.field(validator=at_least(2))


@chz.chz(typecheck=True)
class Depo(SyntheticTask):
    """Successors on a random cycle, several hops ahead.

    Attributes:
      nodes, smallest: most and fewest nodes of an example.
      hops: each question asks 1 to `hops` steps, uniformly.
      questions: questions per example.
      word_tokens, symbols: tokens of a node's name, each one of `symbols`.
    """

    nodes: int = 16
    smallest: int = 3
    hops: int = chz.field(default=4, validator=at_least(1))
    questions: int = chz.field(default=4, validator=at_least(1))
    word_tokens: int = chz.field(default=1, validator=at_least(1))
    symbols: int = chz.field(default=256, validator=at_least(2))

    breakdown = "hop"

    @property
    def vocabulary(self) -> int:
        return _FIRST + self.hops + self.symbols

    def slice(self) -> DepoSlice:
        return self.sized(self.nodes, self.smallest)

    def sized(self, nodes: int, smallest: int) -> DepoSlice:
        """Returns the slice of `smallest` to `nodes` nodes."""
        length = 2 * self.word_tokens * nodes + self.questions * (1 + 2 * self.word_tokens)
        return DepoSlice(length=length, nodes=nodes, smallest=smallest)

    def scaled(self, slice: DepoSlice, factor: int) -> DepoSlice:
        return chz.replace(self.sized(factor * slice.nodes, factor * slice.nodes), weight=slice.weight)

    def at_full_size(self) -> DepoSlice:
        """Returns the slice of exactly `nodes` nodes, for `evaluation`."""
        return self.scaled(self.slice(), 1)

    def check(self, slice: DepoSlice) -> None:
        if slice.smallest > slice.nodes:
            raise UserError(f"smallest={slice.smallest}: must be at most nodes={slice.nodes}")
        if slice.length != (length := self.sized(slice.nodes, slice.smallest).length):
            raise UserError(f"length={slice.length}: {slice.nodes} nodes take {length} tokens")
        if not slice.nodes <= self.symbols**self.word_tokens < 2**31:
            words = f"{self.symbols} ** {self.word_tokens} words"
            raise UserError(f"nodes={slice.nodes}: {words} must be at least as many, and below 2**31")

    def chance(self, slice: DepoSlice) -> float:
        return 1 / (slice.nodes if self.word_tokens == 1 else self.symbols)  # a guess among nodes, or per token

    def group_names(self, slice: DepoSlice) -> tuple[str, ...]:
        return tuple(str(hop + 1) for hop in range(self.hops))

    def spelling(self, token: int) -> str:
        return "." if token == 0 else f"+{token}" if token <= self.hops else str(token - self.hops - _FIRST)

    def sample(self, key: Key[Array, ""], slice: DepoSlice, batch_size: int) -> Batch:
        """Returns a batch with questions x word_tokens targets per row."""
        b, most, size = batch_size, slice.nodes, self.word_tokens
        of_words, of_counts, of_edges, of_starts, of_hops = jax.random.split(key, 5)
        numbers = distinct(of_words, b, self.symbols**size, most)
        powers = self.symbols ** jnp.arange(size, dtype=jnp.int32)[::-1]
        words = _FIRST + self.hops + numbers[:, :, None] // powers % self.symbols  # in the order of the cycle
        sizes = np.arange(slice.smallest, most + 1)
        ends = jnp.asarray(np.cumsum(1 / (sizes + np.sqrt(most))) / np.sum(1 / (sizes + np.sqrt(most))), jnp.float32)
        drawn = jnp.searchsorted(ends[:-1], jax.random.uniform(of_counts, (b, 1)).ravel(), side="right")
        count = (slice.smallest + drawn.astype(jnp.int32))[:, None]

        # Edges of nodes beyond the count sort to the front, and are blank.
        edge = shuffled(of_edges, b, most, jnp.arange(most) < count)
        ahead = jnp.where(edge + 1 < count, edge + 1, 0)
        pairs = jnp.stack([_chosen(words, edge), _chosen(words, ahead)], axis=2)
        edges = jnp.where((edge < count)[:, :, None, None], pairs, 0).reshape(b, -1)
        start = jax.random.randint(of_starts, (b, self.questions), 0, count)
        hop = jax.random.randint(of_hops, (b, self.questions), 0, self.hops, jnp.int32)
        answer = _chosen(words, (start + hop + 1) % count)
        asked = jnp.concatenate([_FIRST + hop[:, :, None], _chosen(words, start), answer], axis=2)
        tokens = jnp.concatenate([edges, asked.reshape(b, -1)], axis=1).astype(jnp.int32)
        ends_of_questions = 2 * size * most + size + jnp.arange(self.questions) * asked.shape[2]
        positions = (ends_of_questions[:, None] + jnp.arange(size)).reshape(1, -1)
        targets = answer.reshape(b, -1).astype(jnp.int32)
        weights, groups = jnp.ones(targets.shape, jnp.float32), jnp.repeat(hop, size, axis=1)
        return Batch(tokens, targets, jnp.broadcast_to(positions, targets.shape), weights, groups=groups)


def _chosen(words: Array, index: Array) -> Array:
    return jnp.take_along_axis(words, index[:, :, None], axis=1)
