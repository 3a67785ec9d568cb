"""Continues prompts from the decoding state: one prefill, then one token at a time inside a compiled loop."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from recollect.configuration import UserError
from recollect.layers.state.capacity import overfull
from recollect.models.functional import FunctionalModel, Params
from recollect.models.memory import check_memory

_TOKEN_BYTES = 24
"""Of each generated token: its random key, the bits that it is split from, and the token, twice."""


def generate(
    model: FunctionalModel,
    params: Params,
    prompts: np.ndarray,
    length: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """Returns `length` sampled tokens after each prompt, (b, length) int32.

    Args:
      prompts: (b, t) int, at least one token each.
      temperature: 0 takes the likeliest token.
      top_p: samples from the smallest set of tokens whose probabilities reach this sum (Holtzman et al. 2020).
      seed: same seed, same text.

    Raises:
      UserError: an empty prompt, an impossible setting, or more tokens than the model can take.
    """
    prompts = np.asarray(prompts, np.int32)
    for possible, reason in (
        (prompts.ndim == 2 and prompts.shape[1] > 0, "generation needs a prompt of at least one token"),
        (length >= 1, f"length={length}: at least one token must be generated"),
        (0 <= temperature < math.inf, f"temperature={temperature}: must be finite and not negative"),
        (0 < top_p <= 1, f"top_p={top_p}: must be in (0, 1]"),
        (0 <= seed < 2**63, f"seed={seed}: must be between 0 and 2^63 - 1"),
    ):
        if not possible:
            raise UserError(reason)
    total = prompts.shape[1] + length
    limit = model.config.maximum_length()
    lengths = f"a prompt of {prompts.shape[1]} tokens and {length} more"
    if limit is not None and total > limit:
        raise UserError(f"{lengths} are {total} tokens; this model takes at most {limit}")
    if total >= 2**31:
        raise UserError(f"length={length:,}: prompt and continuation must be less than {2**31:,} tokens")
    state = jax.eval_shape(lambda params: model.bind(params).init_state(len(prompts), total), params)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    check_memory(held + _TOKEN_BYTES * length * len(prompts), f"generating {length:,} tokens")
    run = _compiled(model, prompts.shape[1], length, temperature == 0)
    settings = (jnp.float32(max(temperature, 1e-6)), jnp.float32(top_p))
    tokens, full = run(params, prompts, jax.random.key(seed), *settings)
    if full:
        raise UserError(f"{lengths} do not fit into the decoding state that this model makes for {total} tokens")
    return np.asarray(tokens)


@functools.lru_cache(maxsize=8)
def _compiled(model: FunctionalModel, prompt_length: int, length: int, greedy: bool):
    def run(
        params: Params,
        prompts: Int[Array, "b t"],
        key: Key[Array, ""],
        temperature: Float[Array, ""],
        top_p: Float[Array, ""],
    ) -> tuple[Int[Array, "b length"], Bool[Array, ""]]:
        module = model.bind(params)
        state = module.init_state(prompts.shape[0], prompt_length + length)
        hidden, state = module.extend(prompts, state)

        def step(carry, key):
            hidden, state = carry
            logits = module.logits(hidden)
            token = jnp.argmax(logits, axis=-1) if greedy else _sample(key, logits / temperature, top_p)
            hidden, state = module.extend(token[:, None].astype(jnp.int32), state)
            return (hidden[:, -1], state), token.astype(jnp.int32)

        (_, state), tokens = jax.lax.scan(step, (hidden[:, -1], state), jax.random.split(key, length))
        return tokens.T, overfull(state)

    return jax.jit(run)


def _sample(key: Key[Array, ""], logits: Float[Array, "b z"], top_p: Float[Array, ""]) -> Int[Array, " b"]:
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    # Kept as long as the tokens before it do not reach top_p: the likeliest always stays.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    choice = jax.random.categorical(key, jnp.where(before < top_p, ranked, -jnp.inf), axis=-1)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0]
