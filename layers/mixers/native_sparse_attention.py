"""Native sparse attention (NSA): three branches, each with keys and values of its own, weighted by gates per head.

    o_t = g_c attend(q_t, compressed blocks) + g_s attend(q_t, selected blocks) + g_w attend(q_t, window),
    g = sigmoid(x_t W_g)
    compressed:  one key phi(k_{id} ... k_{id + l - 1}) and value per block i of l tokens, at stride d, that is past
    selected:    the query's own block of l' tokens, the `local` - 1 before it, the first, and those of the largest
                 importance  sum over heads of a key head, over i, of p_ti overlap(i, block) / d,   `top` in all
    window:      the last w tokens

Yuan et al. 2025 (2502.11089), equations 5 to 12; p are the softmax weights of the compressed branch, so that selection
costs nothing more, and all query heads of a key head read the same blocks. The paper's phi is an unspecified MLP with
positions in the block: here W_2 gelu(W_1 [k_1 + e_1 ... k_l + e_l]), shared by key heads, e from 0, the matrices
N(0, 1 / inputs); compress="mean" is flash-linear-attention's mean. Compressed keys are of rotated ones.

Easy to get wrong: a block is compressed only where all its tokens are past, so that the first l - 1 queries have no
compressed key and the branch gives 0; overlaps count in strides. On every backend all scores are computed and those of
keys not read hidden: it saves no time here. The state keeps every token's three keys and values.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from recollect.configuration import UserError, at_least
from recollect.layers.mixer import MixerOutput, Place
from recollect.layers.mixers.attention import SoftmaxAttention, SoftmaxConfig
from recollect.layers.modules.block_compression import BlockCompression
from recollect.layers.modules.linear import Linear
from recollect.layers.modules.score_biases import ScoreBias
from recollect.layers.modules.selection import hidden_bias, number_read, selected_reads
from recollect.layers.modules.selectors import block_slices, complete_fields
from recollect.layers.state.reads import Reads
from recollect.pallas_kernels.key_schedule import KeyBlocks, KeySchedule, best_blocks, complete_blocks, earlier_blocks
from recollect.pallas_kernels.masks import Causal, SameSegment, Window
from recollect.pallas_kernels.softmax_attention import softmax_attention
from recollect.pallas_kernels.softmax_attention.xla import unnormalised_softmax


@chz.chz(typecheck=True)
class NativeSparseAttention(SoftmaxConfig):
    """Native sparse attention. State: every token's keys and values, three of each per key head.

    Attributes:
      block, stride: tokens of a compressed block, and between the first tokens of two; published 32 and 16.
      compress: what makes one key of a block's; values likewise.
      size: tokens of a selected block, published 64; `stride` must divide it and `block`.
      top: selected blocks, the query's own included; published 16.
      local: newest blocks that are always among them, the query's own included; published 2. So is the first.
      window: published 512.
    """

    NOT_SERVED: ClassVar[dict[str, str]] = {
        "causal": "its compressed and selected blocks are those before a query",
        "cross": "its three branches read blocks and a window before the query, and the source has none",
        "design": "its three branches have masks of their own",
    }

    heads: int = chz.field(default=2, validator=at_least(1))
    block: int = chz.field(default=8, validator=at_least(1))
    stride: int = chz.field(default=4, validator=at_least(1))
    compress: Literal["mlp", "mean"] = "mlp"
    size: int = chz.field(default=8, validator=at_least(1))
    top: int = chz.field(default=4, validator=at_least(1))
    local: int = chz.field(default=2, validator=at_least(1))
    window: int = chz.field(default=16, validator=at_least(1))

    @chz.validate
    def _blocks_fit(self) -> None:
        if self.block % self.stride or self.size % self.stride:
            raise UserError(f"stride={self.stride}: must divide block={self.block} and size={self.size}")
        if self.top < self.local + 1:
            raise UserError(f"top={self.top}: must hold the local={self.local} newest blocks and the first")
        if self.dropout or isinstance(self.positions, ScoreBias):
            what = "dropout" if self.dropout else f"positions={type(self.positions).__name__}"
            raise UserError(f"NativeSparseAttention has three softmax maps: {what} cannot be set")

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> NativeSparseSoftmaxAttention:
        return NativeSparseSoftmaxAttention(self, width, place, rngs)


class NativeSparseSoftmaxAttention(SoftmaxAttention):
    """The module of `NativeSparseAttention`. Its cache counts key heads of the three branches, in the order of the
    module's equation."""

    config: NativeSparseAttention

    def __init__(self, config: NativeSparseAttention, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        self.key_heads *= 3
        self.key = Linear(width, self.key_heads * self.head_dim, "d gk", rngs, bias=config.bias)
        self.value = Linear(width, self.key_heads * self.head_dim, "d gv", rngs, bias=config.bias)
        self.gate = Linear(width, 3 * config.heads, "d h", rngs)
        mlp = config.compress == "mlp"
        self.compress_key = BlockCompression(config.block, self.head_dim, rngs) if mlp else None
        self.compress_value = BlockCompression(config.block, self.head_dim, rngs) if mlp else None

    def _mix(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, fields: dict[str, Any]) -> MixerOutput:
        complete = complete_fields(fields, *x.shape[:2])
        keys, values = jnp.split(k, 3, axis=2), jnp.split(v, 3, axis=2)
        compressed, _, read = self._selected(q, keys[0], values[0], complete)
        seen: dict[str, Any] = {"bias": hidden_bias(read), **self._seen(fields)}
        selected = softmax_attention(q, keys[1], values[1], **seen, **fields)
        near: dict[str, Any] = {"window": self.config.window}
        if "key_positions" in fields:
            near = {"mask": Causal() & SameSegment() & Window(self.config.window)}
        windowed = softmax_attention(q, keys[2], values[2], **near, **fields)
        gates = jax.nn.sigmoid(self.gate(x).astype(jnp.float32)).reshape(*x.shape[:2], 3, -1, 1)
        branches = jnp.stack([compressed, selected, windowed], axis=2)
        return self._finish(jnp.sum(gates * branches, axis=2).astype(x.dtype), x)

    def _reads(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, fields: dict[str, Any]) -> Reads:
        keys, values = jnp.split(k, 3, axis=2), jnp.split(v, 3, axis=2)
        _, past, read = self._selected(q, keys[0], values[0], fields)
        near = fields["query_positions"][:, :, None] - fields["key_positions"][:, None] < self.config.window
        number = number_read(read, keys[1].shape[2], fields) + number_read(near[:, None], 1, fields)
        number += jnp.sum(past, axis=2)
        return selected_reads(number, read, q, keys[1], fields)

    def _selected(
        self, q: jax.Array, k: jax.Array, v: jax.Array, fields: dict[str, jax.Array]
    ) -> tuple[Float[Array, "b t h v"], Bool[Array, "b t n"], Bool[Array, "b h t s"]]:
        """Returns the outputs of the first branch, the blocks that each query reads in it, and the keys that it
        reads in the second."""
        block, stride = self.config.block, self.config.stride
        blocks = complete_blocks(fields["key_positions"], fields["key_segments"], block, stride)
        ended = (fields["query_positions"] + 1 - block) // stride + 1  # blocks that are past with the query's token
        past = earlier_blocks(blocks, ended, fields["query_segments"])
        out, weights = self._compressed(q, k, v, blocks, past)
        read = self._schedule(weights, blocks, fields).mask(**fields)
        return out, past, jnp.repeat(read, q.shape[2] // k.shape[2], axis=1)

    def _compressed(
        self, q: jax.Array, k: jax.Array, v: jax.Array, blocks: KeyBlocks, past: Bool[Array, "b t n"]
    ) -> tuple[Float[Array, "b t h v"], Float[Array, "b t g n"]]:
        """Returns the outputs of the first branch, and its weights summed over the query heads of each key head."""
        (b, t, h, dim), g = q.shape, k.shape[2]
        k, v = (self._blocks(*pair, blocks) for pair in ((k, self.compress_key), (v, self.compress_value)))
        scores = jnp.einsum("btgrk,bngk->btgrn", q.reshape(b, t, g, h // g, dim), k, preferred_element_type=jnp.float32)
        weights, total, _ = unnormalised_softmax(jnp.where(past[:, :, None, None], scores * dim**-0.5, -jnp.inf))
        weights = weights / total[..., None]
        out = jnp.einsum("btgrn,bngv->btgrv", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out.reshape(b, t, h, -1), jnp.sum(weights, axis=3)

    def _blocks(self, x: jax.Array, compress: BlockCompression | None, blocks: KeyBlocks) -> Float[Array, "b n g k"]:
        tokens = jnp.swapaxes(block_slices(x, blocks.start, self.config.block), 2, 3)  # (b, n, g, l, k)
        tokens = jnp.where(blocks.exists[:, :, None, None, None], tokens, 0)
        return jnp.mean(tokens, axis=3) if compress is None else compress(tokens)

    def _schedule(
        self, weights: Float[Array, "b t g n"], compressed: KeyBlocks, fields: dict[str, jax.Array]
    ) -> KeySchedule:
        """Returns the selected blocks."""
        block, stride, size, local = self.config.block, self.config.stride, self.config.size, self.config.local
        blocks = complete_blocks(fields["key_positions"], fields["key_segments"], size)
        starts, others = compressed.start[:, :, None], blocks.start[:, None]
        overlap = jnp.minimum(starts + block, others + size) - jnp.maximum(starts, others)
        overlap = jnp.where(compressed.exists[:, :, None] & blocks.exists[:, None], jnp.maximum(overlap, 0), 0)
        importance = jnp.einsum("btgn,bnm->btgm", weights, (overlap // stride).astype(weights.dtype))
        own = fields["query_positions"] // size
        forced: Bool[Array, "b t m"] = own[:, :, None] - blocks.number[:, None] < local
        forced |= (blocks.number == 0)[:, None]
        allowed = earlier_blocks(blocks, own, fields["query_segments"])
        importance = jnp.where(forced[:, :, None], jnp.inf, importance)
        return KeySchedule(blocks, *best_blocks(importance, allowed[:, :, None], self.config.top - 1), size)
