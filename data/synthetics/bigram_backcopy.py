"""Bigram-Backcopy: text of a Markov chain in which some tokens, the triggers, make the token before them repeat.

    tokens   <s> a  b  t  b  c  t  c        (t is a trigger)
    label    a   b  t  b  c  t  c  .        (what comes next, everywhere)

After <s> comes a draw of the unigram distribution without triggers; after a trigger the token before it; after any
other token a draw of the chain. Triggers are the most frequent tokens. Accuracy is reported for both kinds of token.

Source: Guo et al., Active-Dormant Attention Heads (arXiv 2410.13835); there the chain counts characters of tiny
Shakespeare, which `corpus` may name; without one it is drawn.
"""

from __future__ import annotations

import functools
from pathlib import Path

import chz
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.task import Slice, SyntheticTask


@chz.chz(typecheck=True)
class BigramBackcopy(SyntheticTask):
    """Next tokens of a bigram chain with copies after triggers.

    Attributes:
      characters: tokens beside <s>, which has the last id; of a corpus, its different characters.
      triggers: how many tokens are triggers.
      corpus: a UTF-8 text file whose characters give the chain; None draws one, the same every time.
    """

    length: int = 256
    characters: int = chz.field(default=65, validator=at_least(2))
    triggers: int = chz.field(default=3, validator=at_least(1))
    corpus: str | None = None

    breakdown = "kind"

    @property
    def vocabulary(self) -> int:
        return len(self.chain()[1]) + 1

    def slice(self) -> Slice:
        return Slice(length=self.length)

    def check(self, slice: Slice) -> None:
        if self.triggers >= (tokens := len(self.chain()[1])):
            raise UserError(f"triggers={self.triggers}: must be below the {tokens} tokens of the chain")

    def chance(self, slice: Slice) -> float:
        return 1 / len(self.chain()[1])

    def group_names(self, slice: Slice) -> tuple[str, ...]:
        return ("bigram", "backcopy")

    def spelling(self, token: int) -> str:
        return "<s>" if token == self.vocabulary - 1 else str(token)

    def chain(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the probabilities of the token after each one (v, v), and of tokens (v,), float64."""
        return _drawn(self.characters) if self.corpus is None else _counted(self.corpus)

    def trigger_tokens(self) -> np.ndarray:
        """Returns the ids of the triggers, the most frequent first."""
        return np.argsort(-self.chain()[1], kind="stable")[: self.triggers]

    def sample(self, key: Key[Array, ""], slice: Slice, batch_size: int) -> Batch:
        """Returns a batch in which every position is labelled."""
        after, unigram = self.chain()
        start = len(unigram)
        is_trigger = np.isin(np.arange(start + 1), self.trigger_tokens())
        first = np.where(is_trigger[:-1], 0, unigram)
        ends = np.cumsum(np.concatenate([after, first[None] / first.sum()]), axis=1)
        # Inverse of the distribution function; the last token with a probability ends at 1 exactly.
        limits = jnp.asarray(np.where(ends >= ends[:, -1:], 1.0, ends), jnp.float32)
        draws = jax.random.uniform(key, (slice.length, batch_size))
        triggers = jnp.asarray(is_trigger)

        def following(carry: tuple[Array, Array], draw: Array) -> tuple[tuple[Array, Array], Array]:
            before, token = carry
            drawn = jnp.sum(limits[token] <= draw[:, None], axis=1, dtype=jnp.int32)
            chosen = jnp.where(triggers[token], before, drawn)
            return (token, chosen), chosen

        begin = jnp.full(batch_size, start, jnp.int32)
        targets = jax.lax.scan(following, (begin, begin), draws)[1].T
        tokens = jnp.concatenate([begin[:, None], targets[:, :-1]], axis=1)
        return Batch(tokens, targets, None, jnp.ones(targets.shape, jnp.float32), groups=triggers[tokens].astype(int))


@functools.lru_cache(maxsize=8)
def _drawn(characters: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a chain whose frequent tokens follow Zipf's law roughly, and its stationary distribution."""
    scores = np.random.default_rng(0).normal(0, 1.5, (characters, characters)) - np.log1p(np.arange(characters))
    after = np.exp(scores)
    after /= after.sum(axis=1, keepdims=True)
    unigram = np.full(characters, 1 / characters)
    for _ in range(1000):
        unigram = unigram @ after
    return after, unigram


@functools.lru_cache(maxsize=8)
def _counted(corpus: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the frequencies of pairs and of single characters in a text, in the order of code points."""
    try:
        text = Path(corpus).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"corpus={corpus}: cannot be read as UTF-8 text: {error}") from error
    characters, ids = np.unique(np.array(list(text)), return_inverse=True)
    if not 2 <= len(characters) <= 4096:
        raise UserError(f"corpus={corpus}: has {len(characters)} different characters, 2 to 4096 fit")
    counts = np.zeros((len(characters), len(characters)))
    np.add.at(counts, (ids[:-1], ids[1:]), 1)
    unigram = np.bincount(ids, minlength=len(characters)) / len(ids)
    total = counts.sum(axis=1, keepdims=True)
    # A character that only ends the text has no successor: any may follow.
    return np.where(total > 0, counts / np.maximum(total, 1), unigram), unigram
