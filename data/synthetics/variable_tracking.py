"""Variable tracking (RULER): chains of assignments, hidden in filler; which variables have a value?

    tokens   . . SET a 7 . . SET b a . . . SET c b . ASK 7 a b
    label                                                a b c

Sources: Hsieh et al., RULER (arXiv 2404.06654), section 3 (multi-hop tracing). A name there is five letters, here one
token; its haystack is the noise sentences, here a cycle of 32 tokens or random words.
"""

from __future__ import annotations

from typing import Literal

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.answers import answered
from recollect.data.synthetics.draws import distinct
from recollect.data.synthetics.orders import shuffled
from recollect.data.synthetics.task import Slice, SyntheticTask

CYCLE = 32
_SET, _ASK, _FIRST = 0, 1, 2
_STATEMENT = 3


@chz.chz(typecheck=True)
class VariableTracking(SyntheticTask):
    """Names that share a value through a chain of assignments, in the order of the chain.

    Attributes:
      chains: chains in the context, of different names and values; one is asked.
      hops: assignments of a name to a name per chain; the answer is hops + 1 names.
      names, values, fillers: tokens of each kind; fillers serve a random haystack.
    """

    length: int = 128
    chains: int = chz.field(default=1, validator=at_least(1))
    hops: int = chz.field(default=4, validator=at_least(0))
    names: int = chz.field(default=1000, validator=at_least(1))
    values: int = chz.field(default=1000, validator=at_least(1))
    haystack: Literal["cycle", "random"] = "cycle"
    fillers: int = chz.field(default=1000, validator=at_least(1))

    metric = "exact"
    breakdown = "hop"

    @property
    def vocabulary(self) -> int:
        return _FIRST + self.names + self.values + (CYCLE if self.haystack == "cycle" else self.fillers)

    def slice(self) -> Slice:
        return Slice(length=self.length)

    def check(self, slice: Slice) -> None:
        statements = self.chains * (self.hops + 1)
        needed = _STATEMENT * statements + 2 + self.hops
        if slice.length < needed:
            raise UserError(f"length={slice.length}: {statements} assignments and the question need {needed} tokens")
        for name, needs in (("names", statements), ("values", self.chains)):
            if getattr(self, name) < needs:
                raise UserError(f"{name}={getattr(self, name)}: {needs} different ones are needed, raise it to {needs}")

    def chance(self, slice: Slice) -> float:
        """Returns the share right where each name is guessed among those of the context."""
        return (self.chains * (self.hops + 1)) ** -float(self.hops + 1)

    def group_names(self, slice: Slice) -> tuple[str, ...]:
        return tuple(str(hop) for hop in range(self.hops + 1))

    def spelling(self, token: int) -> str:
        name, value = token - _FIRST, token - _FIRST - self.names
        if name < 0:
            return ("SET", "ASK")[token]
        return f"x{name}" if value < 0 else f"{value}" if value < self.values else "."

    def sample(self, key: Key[Array, ""], slice: Slice, batch_size: int) -> Batch:
        """Returns a batch with hops + 1 targets per row."""
        b, links = batch_size, self.hops + 1
        statements = self.chains * links
        space = slice.length - 2 - self.hops
        of_names, of_values, of_places, of_owners, of_filler = jax.random.split(key, 5)
        names = _FIRST + distinct(of_names, b, self.names, statements).reshape(b, self.chains, links)
        values = _FIRST + self.names + distinct(of_values, b, self.values, self.chains)
        sources = jnp.concatenate([values[:, :, None], names[:, :, :-1]], axis=2).reshape(b, statements)
        # Chains are interleaved in every way with equal probability, each in its own order.
        owners = shuffled(of_owners, b, statements) // links
        earlier = (owners[:, :, None] == owners[:, None, :]) & jnp.tri(statements, k=-1, dtype=bool)
        which = owners * links + jnp.sum(earlier, axis=2)
        name = jnp.take_along_axis(names.reshape(b, statements), which, axis=1)
        source = jnp.take_along_axis(sources, which, axis=1)
        written = jnp.stack([jnp.full_like(name, _SET), name, source], axis=2)

        slots = jnp.sort(distinct(of_places, b, space - statements * (_STATEMENT - 1), statements), axis=1)
        starts = slots + jnp.arange(statements) * (_STATEMENT - 1)
        places = starts[:, :, None] + jnp.arange(_STATEMENT)
        first = _FIRST + self.names + self.values
        if self.haystack == "random":
            filler = jax.random.randint(of_filler, (b, space), first, first + self.fillers, jnp.int32)
        else:
            filler = jnp.broadcast_to(first + jnp.arange(space, dtype=jnp.int32) % CYCLE, (b, space))
        context = filler.at[jnp.arange(b)[:, None, None], places].set(written, unique_indices=True)
        question = jnp.stack([jnp.full(b, _ASK, jnp.int32), values[:, 0]], axis=1)
        hops = jnp.arange(links)
        return answered(jnp.concatenate([context, question], axis=1), names[:, 0], groups=hops)
