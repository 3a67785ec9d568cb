"""Continues prompts from the decoding state: prefill in chunks, then tokens in pieces, each a compiled loop.

    tokens = generate(model, params, prompts, 100)                    # arrays, all at once
    for piece in Generation(model, params, prompts, 100): ...         # as they come, in constant memory

Prompts of different lengths are padded on their left, with segment 0, which never advances a state. A row that is done
gets padding too, so a loop that runs a whole piece gives no state more tokens than were asked for. A row's tokens do
not depend on the rows beside it but for rounding: its random keys are its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from recollect.configuration import UserError
from recollect.layers.context import Context, Source
from recollect.layers.modules.mask_designs import PrefixLM
from recollect.layers.state.capacity import overfull
from recollect.models.functional import FunctionalModel, Params
from recollect.models.language_model import LanguageModel, ModelState
from recollect.models.memory import check_memory
from recollect.models.sampling import Sampling, choose

PIECE = 16
"""Tokens per row that one call of the compiled loop generates at most."""

LONGEST_CHUNK = 512
"""Tokens of the prompts that one call of prefill takes at most."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """The next tokens of every row.

    Attributes:
      tokens: (b, n); of each row `counts` are new, the others are padding.
      log_probabilities: of those tokens, under the model itself: before temperature, filters and penalty.
      counts: 0 for a row that was done before.
    """

    tokens: Int[np.ndarray, "b n"]
    log_probabilities: Float[np.ndarray, "b n"]
    counts: Int[np.ndarray, " b"]


class Generation:
    """Continuations of prompts, iterated piece by piece.

    Args:
      prompts: ids of each, at least one; lengths may differ.
      tokens: to generate after each.
      end: id of the token after which a row is done; None for none.
      sources: ids of the sequence that each prompt's model reads, at least one; of models with an encoder alone.

    Attributes:
      rows: number of prompts.
      state_bytes: of the decoding state of all rows.
      programs: the compiled functions.

    Raises:
      UserError: an empty prompt, or more tokens than the model or the memory can take.
    """

    def __init__(
        self,
        model: FunctionalModel,
        params: Params,
        prompts: Iterable[Any],
        tokens: int,
        sampling: Sampling | None = None,
        *,
        end: int | None = None,
        sources: Iterable[Any] | None = None,
    ):
        rows = [np.asarray(prompt, np.int32) for prompt in prompts]
        if not rows or any(row.ndim != 1 or not row.size for row in rows):
            raise UserError("generation needs a prompt of at least one token")
        if tokens < 1:
            raise UserError(f"tokens={tokens}: at least one token must be generated")
        longest = max(map(len, rows))
        total = longest + tokens
        limit = model.config.maximum_length()
        self._lengths = f"a prompt of {longest} tokens and {tokens} more"
        if limit is not None and total > limit:
            raise UserError(f"{self._lengths} are {total} tokens; this model takes at most {limit}")
        if total >= 2**31:
            raise UserError(f"tokens={tokens:,}: prompt and continuation must be less than {2**31:,} tokens")
        self._total = total
        sampling = sampling or Sampling()
        self._model, self._sampling = model, sampling
        self.programs = programs_of(model, sampling)
        self._source = _source_of(model, sources, len(rows))
        state = jax.eval_shape(
            lambda params, source: model.bind(params).init_state(len(rows), total, source), params, self._source
        )
        self.state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        check_memory(self.state_bytes, f"generating {tokens:,} tokens")
        # Once, not at every call; what is on devices already may span several processes.
        self._params = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf), params)
        self.rows = len(rows)
        self._prompts, self._end = rows, -1 if end is None else end
        self._left = np.full(len(rows), tokens, np.int32)

    def __iter__(self) -> Iterator[Piece]:
        decode = self.programs.decode
        values, keys = self._sampling.values(self._model.vocabulary), self._sampling.row_keys(self._prompts)
        carry, first = self.prefill(), 0
        while np.any(self._left):
            carry, drawn, left = decode(self._params, carry, keys, values, self._left, first, self._end)
            tokens, log_probabilities, full = jax.device_get(drawn)
            if full:
                raise UserError(
                    f"{self._lengths} do not fit into the decoding state that this model makes for {self._total} tokens"
                )
            before, after = self._left, np.array(left)
            first += PIECE
            counts = new_tokens(tokens, before, self._end)
            self._left = after
            yield Piece(tokens, log_probabilities, counts)

    def stop(self, row: int) -> None:
        """Ends a row before its tokens are all generated."""
        self._left[row] = 0

    def prefill(self) -> tuple[Float[Array, "b d"], ModelState, Bool[Array, "b z"] | None]:
        """Returns what the loop starts from: the hidden vectors of the last tokens of the prompts, the state after
        them, and which tokens they hold, where there is a penalty."""
        penalised = self._sampling.has_penalty
        programs = self.programs
        longest = max(map(len, self._prompts))
        policies = [getattr(mixer, "cache", None) for mixer in self._model.config.mixers]
        whole = any(getattr(policy, "whole_prompts", False) for policy in policies)
        # Tokens of a prefix see each other, so that they come in one call.
        whole = whole or prefix_type(self._model.config) is not None
        chunk = longest if whole else chunk_of(longest)
        width = -(-longest // chunk) * chunk
        tokens, segments = np.zeros((2, self.rows, width), np.int32)
        seen = np.zeros((self.rows, self._model.vocabulary), bool) if penalised else None
        for row, prompt in enumerate(self._prompts):
            tokens[row, width - len(prompt) :] = prompt
            segments[row, width - len(prompt) :] = 1
            if seen is not None:
                seen[row, prompt] = True
        state = programs.start(self._params, self.rows, self._total, self._source)
        for at in range(0, width, chunk):
            part = slice(at, at + chunk)
            hidden, state = programs.prefill(self._params, state, tokens[:, part], segments[:, part])
        return hidden, state, None if seen is None else jnp.asarray(seen)


def prefix_type(config: LanguageModel) -> int | None:
    """Returns the type that tokens of prompts have in a model with a `PrefixLM` mask; None in other models."""
    designs = [getattr(mixer, "design", None) for mixer in config.mixers]
    return next((design.token_type for design in designs if isinstance(design, PrefixLM)), None)


def _source_of(model: FunctionalModel, sources: Iterable[Any] | None, rows: int) -> Source | None:
    """Returns the sources of all rows, padded on their right; raises UserError where they do not fit the model."""
    if (sources is None) != (model.config.encoder is None):
        what = "needs a source for each prompt" if sources is None else "has no encoder to read sources"
        raise UserError(f"generation: this model {what}")
    if sources is None:
        return None
    ids = [np.asarray(source, np.int32) for source in sources]
    if len(ids) != rows or any(one.ndim != 1 or not one.size for one in ids):
        raise UserError(f"generation needs a source of at least one token for each of the {rows} prompts")
    tokens, segments = np.zeros((2, rows, max(map(len, ids))), np.int32)
    for row, one in enumerate(ids):
        tokens[row, : len(one)], segments[row, : len(one)] = one, 1
    return Source(context=Context(token_ids=jnp.asarray(tokens), segments=jnp.asarray(segments)))


def new_tokens(tokens: Int[np.ndarray, "b n"], left: Int[np.ndarray, " b"], end: int) -> Int[np.ndarray, " b"]:
    """Returns how many tokens of a call of the loop are new in each row, which had `left` to generate before it."""
    # A row that its end token stopped has 0 left, however few it used: count up to that token.
    ended = tokens == end
    counts = np.minimum(left, tokens.shape[1])
    return np.where(ended.any(1), np.minimum(counts, ended.argmax(1) + 1), counts)


def chunk_of(longest: int) -> int:
    """Returns the tokens per row of each call of prefill, for prompts of at most `longest` tokens."""
    return min(LONGEST_CHUNK, 1 << (longest - 1).bit_length())


def generate(
    model: FunctionalModel,
    params: Params,
    prompts: Iterable[Any],
    tokens: int,
    sampling: Sampling | None = None,
    *,
    end: int | None = None,
    sources: Iterable[Any] | None = None,
) -> Int[np.ndarray, "b tokens"]:
    """Returns the tokens after each prompt; see `Generation`. After its end token, a row holds nothing but that."""
    running = Generation(model, params, prompts, tokens, sampling, end=end, sources=sources)
    check_memory(running.state_bytes + 4 * tokens * running.rows, f"generating {tokens:,} tokens")
    generated = np.full((running.rows, tokens), -1 if end is None else end, np.int32)
    at = 0
    for piece in running:
        for row, count in enumerate(piece.counts):
            generated[row, at : at + count] = piece.tokens[row, :count]
        at += PIECE
    return generated


@dataclasses.dataclass(frozen=True)
class GenerationPrograms:
    """The compiled functions of a model. States are donated: each call writes into the memory of the last.

    Attributes:
      start: (params, rows, total, source or None) -> the state before any token.
      prefill: (params, state, tokens, segments) -> hidden vectors of the last tokens, and the state after them.
      decode: (params, carry, keys, values, left, first, end) -> carry, (tokens, log-probabilities, overfull), left:
        PIECE tokens for each row that has so many left. `carry` is what `Generation.prefill` returns; `first` numbers
        the rows' next tokens; `first`, and (b, 1) of what `Sampling.values` holds, may differ by row.
    """

    start: Any
    prefill: Any
    decode: Any


def programs_of(model: FunctionalModel, sampling: Sampling) -> GenerationPrograms:
    """Returns the compiled functions of a model and a kind of sampling."""
    return _programs(model, sampling.is_greedy, sampling.has_filter, sampling.has_penalty)


@functools.lru_cache(maxsize=8)
def _programs(model: FunctionalModel, greedy: bool, filtered: bool, penalised: bool) -> GenerationPrograms:
    prefix = prefix_type(model.config)

    def start(params: Params, rows: int, total: int, source: Source | None = None) -> ModelState:
        return model.bind(params).init_state(rows, total, source)

    def prefill(
        params: Params, state: ModelState, tokens: Int[Array, "b t"], segments: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b d"], ModelState]:
        types = None if prefix is None else jnp.full_like(tokens, prefix)
        hidden, state = model.bind(params).extend(tokens, state, Context(segments=segments, token_types=types))
        return hidden[:, -1], state

    def decode(
        params: Params,
        carry: tuple[Any, ...],
        keys: Key[Array, " b"],
        values: dict[str, Any],
        left: Int[Array, " b"],
        first: Int[Array, "#b"] | Int[Array, ""],
        end: Int[Array, ""],
    ) -> tuple[Any, ...]:
        module = model.bind(params)
        rows = jnp.arange(left.shape[0])

        def step(at: Int[Array, ""], carry: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, state, seen, left, tokens, log_probabilities = carry
            active = left > 0
            logits = module.logits(hidden)
            token_keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(first + at, rows.shape))
            token = choose(token_keys, logits, values, greedy=greedy, filtered=filtered, seen=seen)
            chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
            segments = jnp.where(active, 1, 0)[:, None]
            hidden, state = module.extend(token[:, None], state, Context(segments=segments))
            if seen is not None:
                seen = seen.at[rows, token].set(True)
            left = jnp.where(active, jnp.where(token == end, 0, left - 1), 0)
            tokens, log_probabilities = tokens.at[:, at].set(token), log_probabilities.at[:, at].set(chosen)
            return hidden[:, -1], state, seen, left, tokens, log_probabilities

        room = (rows.size, PIECE)
        blank = (jnp.full(room, -1, jnp.int32), jnp.zeros(room, jnp.float32))
        loop = jax.lax.while_loop(
            lambda carry: (carry[0] < PIECE) & jnp.any(carry[1][3] > 0),
            lambda carry: (carry[0] + 1, step(carry[0], carry[1])),
            (jnp.int32(0), (*carry, left, *blank)),
        )
        hidden, state, seen, left, tokens, log_probabilities = loop[1]
        return (hidden, state, seen), (tokens, log_probabilities, overfull(state)), left

    return GenerationPrograms(
        jax.jit(start, static_argnums=(1, 2)),
        jax.jit(prefill, donate_argnums=1),
        jax.jit(decode, donate_argnums=1),
    )
