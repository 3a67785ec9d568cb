"""InfiniRetri: reads a context of any length window by window, and keeps the token ids of the sentences that matter.

    kept = ()
    for each window of whole sentences:   read kept + window + question, at positions from 0
        score_j = attention that token j gets in the last softmax layer, summed over heads, question and neighbours
        kept    = the sentences, whole and in order, that hold one of the `top` tokens by score
    the question is answered after what is kept

CapitalCode2020/InfiniRetri2 and its paper (arXiv 2502.12962). Ids are kept, not keys and values, so positions never go
beyond those of a window. Where the source is silent this is a reconstruction: the last softmax layer, scores summed
over heads, and a bound on what is kept.

Easy to get wrong: what is read is one document without gaps, since short convolutions would see padding in between; a
window ends where a sentence does.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chz
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from recollect.configuration import Config, UserError, at_least
from recollect.layers.context import Context
from recollect.layers.mixers.attention import Attention
from recollect.layers.state.cache_policy import CachePolicy, CacheSizes, Full, NewTokens, View
from recollect.layers.state.eviction import by_row
from recollect.models.functional import FunctionalModel, Params


@chz.chz(typecheck=True)
class InfiniRetri(Config):
    """How a context is read.

    Attributes:
      window: tokens read at once beside those kept. A context that fits one window is read whole, without a search.
      top: tokens whose sentences are kept.
      phrase: neighbouring tokens over which scores are summed: about the length of an answer.
      budget: tokens kept at most: sentences by their best score, as far as they fit. Published, there is no bound.
    """

    window: int = chz.field(default=1024, validator=at_least(1))
    top: int = chz.field(default=300, validator=at_least(1))
    phrase: int = chz.field(default=8, validator=at_least(1))
    budget: int = chz.field(default=1024, validator=at_least(1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeptTokens:
    """What is kept of the context of each row, in order, after padding.

    Attributes:
      tokens, sentences: ids.
      valid: which are no padding.
    """

    tokens: Int[Array, "b n"]
    sentences: Int[Array, "b n"]
    valid: Bool[Array, "b n"]

    @classmethod
    def none(cls, rows: int, budget: int) -> KeptTokens:
        """Returns room for `budget` tokens per row, none of them kept."""
        return cls(*(jnp.zeros((rows, budget), dtype) for dtype in (jnp.int32, jnp.int32, bool)))

    def prompts(self, question: Int[Array, "b t"]) -> list[np.ndarray]:
        """Returns what `generate` takes: of each row what is kept, and then its question."""
        rows = zip(*(np.asarray(x) for x in (self.tokens, self.valid, question)), strict=True)
        return [np.concatenate([tokens[valid], asked]) for tokens, valid, asked in rows]


def retrieve_sentences(
    model: FunctionalModel,
    params: Params,
    context: Int[Array, "b s"],
    sentences: Int[Array, "b s"],
    question: Int[Array, "b t"],
    reading: InfiniRetri,
) -> tuple[KeptTokens, Float[Array, " b"]]:
    """Returns what is kept of each context for its question, and the keys that the question's tokens read in the
    search: a mean over key heads, summed over tokens, windows and layers of `Attention`. May be jitted.

    Args:
      sentences: the sentence of each token, numbers that never fall along a row. A sentence longer than a window is cut
        there; one longer than the budget is not kept.

    Raises:
      UserError: the model has no `Attention` whose scores could be read, or has landmarks.
    """
    (b, s), t = context.shape, question.shape[1]
    if s <= reading.window:
        return KeptTokens(context, sentences, jnp.ones((b, s), bool)), jnp.zeros(b)
    scorer, layers = _scorer(model, t)
    module: Any = scorer.bind(params)
    ends = jnp.concatenate([jnp.diff(sentences, axis=1) != 0, jnp.ones((b, 1), bool)], axis=1)

    def read_window(carry: tuple[jax.Array, KeptTokens, jax.Array]) -> tuple[jax.Array, KeptTokens, jax.Array]:
        start, kept, keys_read = carry
        index = start[:, None] + jnp.arange(reading.window)
        at = jnp.minimum(index, s - 1)
        of_window = [jnp.take_along_axis(x, at, axis=1) for x in (context, sentences, ends)]
        stop = jnp.max(jnp.where(of_window[2] & (index < s), index + 1, 0), axis=1)
        stop = jnp.where(stop > 0, stop, jnp.minimum(start + reading.window, s))
        window = KeptTokens(of_window[0], of_window[1], index < stop[:, None])
        both = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), kept, window)
        both = _taken(both, jnp.argsort(both.valid, axis=1, stable=True))
        asked = jnp.concatenate([both.tokens, question], axis=1)
        segments = jnp.concatenate([both.valid, jnp.ones((b, t), bool)], axis=1).astype(jnp.int32)
        _, state = module.extend(asked, module.init_state(*asked.shape), Context(segments=segments))
        mass = jnp.sum(state.layers[layers[-1]].cache, axis=1)[:, :-t]
        keep = whole_sentences(mass, both, reading)
        both = dataclasses.replace(both, valid=keep)
        fewer = _taken(both, jnp.argsort(keep, axis=1, stable=True)[:, -reading.budget :])
        reads = len(layers) * t * (jnp.sum(segments, axis=1) - (t - 1) / 2)
        # Rows whose windows are longer are done before the others.
        return by_row(start < s, (stop, fewer, keys_read + reads), carry)

    carry = (jnp.zeros(b, jnp.int32), KeptTokens.none(b, reading.budget), jnp.zeros(b))
    _, kept, keys_read = jax.lax.while_loop(lambda carry: jnp.any(carry[0] < s), read_window, carry)
    return kept, keys_read


def whole_sentences(mass: Float[Array, "b n"], read: KeptTokens, reading: InfiniRetri) -> Bool[Array, "b n"]:
    """Returns which tokens of a window stay: the whole sentences that hold one of the best by score, as far as they
    fit; `mass` is the attention that each token got."""
    valid, (b, n) = read.valid, mass.shape
    before = (reading.phrase - 1) // 2
    reach = ((0, 0), (before, reading.phrase - 1 - before))
    score = jax.lax.reduce_window(jnp.where(valid, mass, 0), 0.0, jax.lax.add, (1, reading.phrase), (1, 1), reach)
    score = jnp.where(valid, score, -jnp.inf)
    least = jax.lax.top_k(score, min(reading.top, n))[0][:, -1:]
    changes = jnp.pad(jnp.diff(read.sentences, axis=1) != 0, ((0, 0), (1, 0)))
    changes |= valid & ~jnp.pad(valid[:, :-1], ((0, 0), (1, 0)))
    group = jnp.cumsum(valid & changes, axis=1)  # 0 for padding
    rows = jnp.arange(b)[:, None]
    best = jnp.full((b, n + 1), -jnp.inf).at[rows, group].max(score)
    size = jnp.zeros((b, n + 1), jnp.int32).at[rows, group].add(valid)
    best = jnp.where((best >= least) & (size <= reading.budget), best, -jnp.inf)
    order = jnp.argsort(-best, axis=1, stable=True)
    fits = jnp.cumsum(jnp.take_along_axis(size, order, axis=1), axis=1) <= reading.budget
    fits = jnp.zeros((b, n + 1), bool).at[rows, order].set(fits) & (best > -jnp.inf)
    return valid & jnp.take_along_axis(fits, group, axis=1)


def _taken(read: KeptTokens, index: Int[Array, "b n"]) -> KeptTokens:
    return jax.tree.map(lambda x: jnp.take_along_axis(x, index, axis=1), read)


@chz.chz(typecheck=True)
class _QuestionMass(CachePolicy):
    """Keeps nothing of the tokens of one call but the attention that each got from the last `rows`, (b, g, t)."""

    rows: int = chz.field(default=1, validator=at_least(1))

    @property
    def mass_rows(self) -> int | None:
        return self.rows

    def init(self, sizes: CacheSizes) -> Float[Array, "b g t"]:
        return jnp.zeros((sizes.batch_size, sizes.heads, sizes.max_length))

    def past(self, cache: jax.Array, new: NewTokens) -> tuple[View, ...]:
        return ()

    def prefill(
        self,
        cache: jax.Array,
        new: NewTokens,
        views: tuple[View, ...],
        masses: tuple[Float[Array, "b g _"], ...],
        out: Float[Array, "b t h v"],
    ) -> Float[Array, "b g t"]:
        return masses[0]


def _scorer(model: FunctionalModel, rows: int) -> tuple[FunctionalModel, list[int]]:
    """Returns the model whose last layer of `Attention` has a `_QuestionMass` for its state, and the numbers of the
    layers of `Attention`."""
    layers = [number for number, mixer in enumerate(model.config.mixers) if isinstance(mixer, Attention)]
    if not layers or model.config.landmark_block:
        why = "has none" if not layers else "has landmarks among its tokens"
        raise UserError(f"InfiniRetri reads the scores of a model's last layer of Attention; this model {why}")
    stages = list(model.config.stages)
    last = max(i for i, stage in enumerate(stages) if any(isinstance(one, Attention) for one in stage.pattern))
    for number, stage in enumerate(stages):
        pattern = [chz.replace(one, cache=Full()) if isinstance(one, Attention) else one for one in stage.pattern]
        if number == last:
            at = max(i for i, one in enumerate(pattern) if isinstance(one, Attention))
            pattern[at] = chz.replace(pattern[at], cache=_QuestionMass(rows=rows))
        stages[number] = chz.replace(stage, pattern=tuple(pattern))
    return FunctionalModel(chz.replace(model.config, stages=tuple(stages)), model.vocabulary), layers
