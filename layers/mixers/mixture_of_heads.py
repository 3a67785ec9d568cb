"""Mixture of heads: shared heads that always count, and routed heads of which each token picks a few (Jin et al. 2024,
MoH).

With p = softmax(W_r x) over the routed heads, m the top-K of p, s = softmax(W_s x) over the shared ones and a =
softmax(W_h x),

    y = W_o [g_1 o_1 ... g_h o_h],    shared heads first
    gates="paper"   g = [a_1 s, a_2 p m]                                        (equations 5 and 6)
    gates="code"    g = [2 a_1 h_s s, 2 a_2 K p m / sum(p m)]                   (the authors' code: mean 1 in each part)
    gates="ones"    g = [1, m],  p = softmax(n / std(n)),  n_i = |q_i|          (MoH-LLaMA3: no router has weights)

    head_balance = balance_weight * sum_i P_i f_i             balance="paper" (equation 7)
                 = balance_weight * (h - h_s) sum_i P_i f_i   balance="code"

P_i is the mean over the batch's tokens of p_i and f_i the share of them that pick routed head i, so that sum_i P_i = 1
and sum_i f_i = K: under uniform routing sum_i P_i f_i = K / (h - h_s), and K on the code's scale. Padding enters
neither; the gradient passes through P only. The batch is the whole one, over all devices and all pieces of
`run.accumulate`: their sums are added up and the loss is formed once, no mean of the pieces' losses.

The authors' code computes every head for every token and multiplies by the gates. Here attention of routed heads is
computed for the tokens that chose them (pallas_kernels/head_mixture_attention) wherever that takes less time than all
heads; decoding reads keys and values of the chosen heads only. Projections are dense, and the cache keeps all keys,
since a later token may choose any head.

Easy to get wrong: paper gates start the output near 1/h of plain attention's, which slows learning; ties must still
pick exactly K heads, so the choice comes from indices, not from a threshold; routers run in fp32; W_s is absent for one
shared head (its gate is 1), W_h without shared or without routed heads (then a = 1, and 1 for "code" too). Gates of
"ones" pass the gradient of p straight through, of chosen heads only, since the others' outputs are not computed;
rotation does not change the norms. A gathered query's place among others, and with it the last bits of its output, may
depend on later tokens' choices.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from recollect.configuration import UserError, at_least, requires
from recollect.layers.mixer import MixerOutput, Place, Traits
from recollect.layers.mixers.attention import SoftmaxAttention, SoftmaxConfig
from recollect.layers.modules.linear import Linear
from recollect.layers.modules.score_biases import ScoreBias
from recollect.layers.token_sums import TokenSums, Values, number_of_tokens, sum_over_tokens
from recollect.pallas_kernels.head_mixture_attention import head_mixture_attention, skips
from recollect.pallas_kernels.softmax_attention import softmax_attention


@chz.chz(typecheck=True)
class MixtureOfHeads(SoftmaxConfig):
    """Mixture-of-head attention. Tokens compute their own heads alone where attention is causal.

    Attributes:
      shared: number of heads that every token uses, the first ones.
      active: routed heads per token, of the `heads - shared`; 0 when all heads are shared.
      gates: how heads' outputs are weighted, see the module's equations.
      balance: scale of the balance loss, see there.
      balance_weight: its coefficient; 0 for none.
    """

    heads: int = chz.field(default=8, validator=at_least(1))
    shared: int = 2
    active: int = 3
    gates: Literal["paper", "code", "ones"] = "code"
    balance: Literal["paper", "code"] = "paper"
    balance_weight: float = chz.field(default=0.01, validator=requires(lambda value: value >= 0, "must be 0 or more"))

    @chz.validate
    def _no_bias(self) -> None:
        if isinstance(self.positions, ScoreBias):
            raise UserError(
                f"MixtureOfHeads adds no bias to scores: positions={type(self.positions).__name__} must be Rotary, "
                "LearnedPositions or None"
            )

    @chz.validate
    def _possible_routing(self) -> None:
        if not 0 <= self.shared <= self.heads:
            raise UserError(f"shared={self.shared}: must be from 0 to heads={self.heads}")
        if self.routed and not 1 <= self.active <= self.routed:
            raise UserError(f"active={self.active}: must be from 1 to the {self.routed} routed heads (heads - shared)")
        if not self.routed and self.active:
            raise UserError(f"active={self.active}: must be 0 when all {self.heads} heads are shared")

    @chz.validate
    def _norms_differ(self) -> None:
        if self.gates == "ones" and self.query_key_norm:
            raise UserError('gates="ones" ranks heads by the norm of queries, which query_key_norm=True makes alike')

    @property
    def routed(self) -> int:
        """Number of heads among which tokens choose."""
        return self.heads - self.shared

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, exact_causality=self.active == self.routed)

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> MixtureOfHeadsAttention:
        return MixtureOfHeadsAttention(self, width, place, rngs)


class MixtureOfHeadsAttention(SoftmaxAttention):
    """The module of `MixtureOfHeads`."""

    config: MixtureOfHeads

    def __init__(self, config: MixtureOfHeads, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        learned, both = config.gates != "ones", config.shared and config.routed
        self.routed_router = Linear(width, config.routed, "d r", rngs) if learned and config.routed else None
        self.shared_router = Linear(width, config.shared, "d r", rngs) if learned and config.shared > 1 else None
        self.kind_router = Linear(width, 2, "d r", rngs) if learned and both else None

    def route(
        self, x: Float[Array, "b t d"], q: Float[Array, "b t h k"]
    ) -> tuple[Float[Array, "b t h"], Float[Array, "b t routed"], Bool[Array, "b t routed"]]:
        """Returns the gates of all heads, and for the routed heads probabilities and whether each was chosen, all in
        fp32."""
        config = self.config
        x = x.astype(jnp.float32)
        averages_one = config.gates == "code"
        shared, routed = jnp.ones((*x.shape[:2], config.shared)), jnp.zeros((*x.shape[:2], config.routed))
        probabilities, chosen = routed, routed > 0
        if self.shared_router is not None:
            shared = jax.nn.softmax(self.shared_router(x), axis=-1) * (config.shared if averages_one else 1)
        if config.routed:
            logits = self._norms(q) if self.routed_router is None else self.routed_router(x)
            probabilities = jax.nn.softmax(logits, axis=-1)
            # The top of the logits, since probabilities that underflow to 0 would tie.
            chosen = jax.nn.one_hot(jax.lax.top_k(logits, config.active)[1], config.routed, dtype=bool).any(axis=-2)
            routed = jnp.where(chosen, probabilities, 0)
            if config.gates == "ones":
                routed = jnp.where(chosen, 1 + (probabilities - jax.lax.stop_gradient(probabilities)), 0)
            if averages_one:
                total = jnp.sum(routed, axis=-1, keepdims=True)
                routed = config.active * routed / jnp.maximum(total, jnp.finfo(jnp.float32).eps)
        if self.kind_router is not None:
            kinds = jax.nn.softmax(self.kind_router(x), axis=-1) * (2 if averages_one else 1)
            shared, routed = kinds[..., :1] * shared, kinds[..., 1:] * routed
        return jnp.concatenate([shared, routed], axis=-1), probabilities, chosen

    def _norms(self, q: Float[Array, "b t h k"]) -> Float[Array, "b t routed"]:
        """Returns the norms of the routed heads' queries over their standard deviation, fp32."""
        squares = jnp.sum(jnp.square(q[:, :, self.config.shared :].astype(jnp.float32)), axis=-1)
        norms = jnp.sqrt(squares + 1e-12)  # padding has queries of 0, where a square root has no gradient
        spread = jnp.var(norms, axis=-1, keepdims=True, ddof=min(1, self.config.routed - 1))
        return norms * jax.lax.rsqrt(spread + 1e-12)

    def _mix(
        self,
        x: Float[Array, "b t d"],
        q: Float[Array, "b t h k"],
        k: Float[Array, "b s g k"],
        v: Float[Array, "b s g v"],
        fields: dict[str, Any],
    ) -> MixerOutput:
        config, segments = self.config, fields["query_segments"]
        gates, probabilities, chosen = self.route(x, q)
        tokens, whole = (q.shape[1], k.shape[1]), "key_positions" not in fields
        # Dropped weights are known for all heads at once; the operation of chosen heads is causal.
        some = "dropout" not in fields and config.routed and config.mask() is None
        if some and skips(*tokens, config.routed, config.active, self_attention=whole):
            o = self._attend_chosen(q, k, v, gates, chosen, fields)
        else:
            o = (softmax_attention(q, k, v, **self._seen(fields), **fields) * gates[..., None]).astype(q.dtype)
        out = self._finish(o, x)
        active = (config.shared + config.active) / config.heads
        if not config.routed:
            return MixerOutput(out.hidden, metrics={"active_heads": jnp.float32(active)})
        use = HeadUse(
            probabilities=sum_over_tokens(probabilities, segments),
            choices=sum_over_tokens(chosen, segments),
            tokens=number_of_tokens(x, segments),
            scale=config.balance_weight * (config.routed if config.balance == "code" else 1),
            active=active,
        )
        return MixerOutput(out.hidden, *use.formed(), use)

    def _attend_chosen(
        self,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b s g k"],
        v: Float[Array, "b s g v"],
        gates: Float[Array, "b t h"],
        chosen: Bool[Array, "b t routed"],
        fields: dict[str, Any],
    ) -> Float[Array, "b t h v"]:
        """Returns heads' outputs times their gates: shared heads for all tokens, routed ones for those that chose
        them."""
        shared, per = self.config.shared, self.config.heads // self.key_heads
        first = shared // per  # the first key head that routed heads use
        key_heads = tuple(head // per - first for head in range(shared, self.config.heads))
        routed = head_mixture_attention(
            q[:, :, shared:],
            k[:, :, first:],
            v[:, :, first:],
            chosen,
            active=self.config.active,
            gates=gates[..., shared:],
            key_heads=key_heads,
            **fields,
        )
        if not shared:
            return routed
        # A key head that is also a routed head's is copied for each shared head.
        used = slice(first) if shared % per == 0 else [head // per for head in range(shared)]
        o = softmax_attention(q[:, :, :shared], k[:, :, used], v[:, :, used], **fields)
        return jnp.concatenate([(o * gates[..., :shared, None]).astype(q.dtype), routed], axis=2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadUse(TokenSums):
    """How tokens use the routed heads: sums of their probabilities and of their choices, and the number of tokens.

    `scale` is the balance loss' coefficient, `active` the share of all heads that a token uses.
    """

    probabilities: Float[Array, " routed"]
    choices: Float[Array, " routed"]
    tokens: Float[Array, ""]
    scale: float = dataclasses.field(metadata={"static": True})
    active: float = dataclasses.field(metadata={"static": True})

    def formed(self) -> tuple[Values, Values]:
        number = jnp.maximum(self.tokens, 1)
        mean, share = self.probabilities / number, self.choices / number
        loss = self.scale * jnp.sum(mean * jax.lax.stop_gradient(share))
        metrics = {"head_share_min": jnp.min(share), "head_share_max": jnp.max(share)}
        return {"head_balance": loss}, {"active_heads": jnp.float32(self.active), **metrics}
