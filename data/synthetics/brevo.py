"""Brevo (PhysicsLM4): a directed acyclic graph, given by its edges in random order, and a node; on which nodes does it
depend, in topological order?

    tokens   a b  c d  a d  e c   ? d a e c     (edges from a node to one that depends on it)
    label                           a e c d .   (the node's ancestors, the node, an end)

Any topological order would do; the label is the one by depth (the longest path from a node without parents), and among
nodes of one depth by token id. Node i of N has up to `parents` parents among those before it; the node asked is the
last, which has at least one.

Source: Allen-Zhu, Physics of Language Models 4.1 (arXiv 2512.17351), Brevo; PhysicsLM4, where the order is a random
valid one and answers are checked by a program.
"""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.answers import answered
from recollect.data.synthetics.draws import distinct
from recollect.data.synthetics.orders import shuffled
from recollect.data.synthetics.task import Slice, SyntheticTask

_BLANK, _ASK, _END, _FIRST = 0, 1, 2, 3


@chz.chz(typecheck=True)
class BrevoSlice(Slice):
    """Graphs of `nodes` nodes; the length follows from them (`Brevo.sized`)."""

    nodes: int = chz.field(validator=at_least(2))


@chz.chz(typecheck=True)
class Brevo(SyntheticTask):
    """Topological order of what a node depends on.

    Attributes:
      nodes: nodes per graph.
      parents: largest in-degree; each node has 0 to `parents`, uniformly, as far as there are nodes before it.
      names: token ids of nodes.
    """

    nodes: int = 10
    parents: int = chz.field(default=4, validator=at_least(1))
    names: int = 256

    @property
    def vocabulary(self) -> int:
        return _FIRST + self.names

    def slice(self) -> BrevoSlice:
        return self.sized(self.nodes)

    def sized(self, nodes: int) -> BrevoSlice:
        """Returns the slice of graphs of `nodes` nodes: its length has room for all edges, a question and an answer."""
        return BrevoSlice(length=2 * self._edges(nodes) + 2 + nodes, nodes=nodes)

    def scaled(self, slice: BrevoSlice, factor: int) -> BrevoSlice:
        return chz.replace(self.sized(factor * slice.nodes), weight=slice.weight)

    def check(self, slice: BrevoSlice) -> None:
        if slice.length != (length := self.sized(slice.nodes).length):
            raise UserError(f"length={slice.length}: graphs of {slice.nodes} nodes take {length} tokens")
        if self.names < slice.nodes:
            raise UserError(f"names={self.names}: {slice.nodes} nodes need as many, raise names to {slice.nodes}")

    def chance(self, slice: BrevoSlice) -> float:
        return 1 / slice.nodes  # a guess per token, among the nodes

    def spelling(self, token: int) -> str:
        return str(token - _FIRST) if token >= _FIRST else (".", "ASK", "END")[token]

    def _edges(self, nodes: int) -> int:
        return sum(min(node, self.parents) for node in range(nodes))

    def sample(self, key: Key[Array, ""], slice: BrevoSlice, batch_size: int) -> Batch:
        """Returns a batch with nodes + 1 targets per row, those beyond the end of weight 0."""
        b, n = batch_size, slice.nodes
        most = min(self.parents, n - 1)
        of_names, of_parents, of_degrees, of_order = jax.random.split(key, 4)
        names = _FIRST + distinct(of_names, b, self.names, n)
        # The first `degree` of a random order of the nodes before each one are its parents.
        before = jnp.tri(n, k=-1, dtype=bool)
        noise = jnp.where(before, jax.random.uniform(of_parents, (b, n, n)), -1.0)
        parents = jax.lax.top_k(noise, most)[1]
        degree = jax.random.randint(of_degrees, (b, n), (jnp.arange(n) == n - 1).astype(jnp.int32), self.parents + 1)
        degree = jnp.minimum(degree, jnp.arange(n))
        is_edge = jnp.arange(most) < degree[:, :, None]

        used, depth = _ancestors(parents, is_edge), _depths(parents, is_edge)
        order = jnp.argsort(jnp.where(used, depth * (self.names + _FIRST) + names, jnp.iinfo(jnp.int32).max), axis=1)
        length = jnp.sum(used, axis=1, keepdims=True)
        place = jnp.arange(n + 1)
        listed = jnp.pad(jnp.take_along_axis(names, order, axis=1), ((0, 0), (0, 1)))
        answer = jnp.where(place < length, listed, jnp.where(place == length, _END, _BLANK))

        sources = jnp.take_along_axis(names, parents.reshape(b, -1), axis=1)
        targets = jnp.repeat(names, most, axis=1)
        # Places that hold no edge sort to the front; those that never do, of the first nodes, are cut off.
        chosen = shuffled(of_order, b, n * most, is_edge.reshape(b, -1))[:, n * most - self._edges(n) :]
        pairs = jnp.where(is_edge.reshape(b, -1, 1), jnp.stack([sources, targets], axis=2), _BLANK)
        edges = jnp.take_along_axis(pairs, chosen[:, :, None], axis=1).reshape(b, -1)
        question = jnp.stack([jnp.full(b, _ASK, jnp.int32), names[:, -1]], axis=1)
        return answered(jnp.concatenate([edges, question], axis=1), answer, weights=place <= length)


def _depths(parents: Int[Array, "b n p"], is_edge: Bool[Array, "b n p"]) -> Int[Array, "b n"]:
    """Returns the longest path to each node from one without parents."""
    b, n, _ = parents.shape

    def node(depths: Array, i: Array) -> tuple[Array, None]:
        above = jnp.where(is_edge[:, i], jnp.take_along_axis(depths, parents[:, i], axis=1) + 1, 0)
        return depths.at[:, i].set(jnp.max(above, axis=1)), None

    return jax.lax.scan(node, jnp.zeros((b, n), jnp.int32), jnp.arange(n))[0]


def _ancestors(parents: Int[Array, "b n p"], is_edge: Bool[Array, "b n p"]) -> Bool[Array, "b n"]:
    """Returns which nodes the last one depends on, with itself."""
    b, n, _ = parents.shape

    def node(used: Array, i: Array) -> tuple[Array, None]:
        reached = used[:, i, None] & is_edge[:, i]
        return used.at[jnp.arange(b)[:, None], parents[:, i]].max(reached), None

    last = jnp.broadcast_to(jnp.arange(n) == n - 1, (b, n))
    return jax.lax.scan(node, last, jnp.arange(n), reverse=True)[0]
