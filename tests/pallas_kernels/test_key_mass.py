"""The second pass that sums probabilities per key, against the array of all pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.pallas_kernels.masks import Causal, SameSegment, TokenFields, Window
from recollect.pallas_kernels.softmax_attention import key_mass as module
from recollect.pallas_kernels.softmax_attention import softmax_attention
from recollect.pallas_kernels.softmax_attention.key_mass import key_mass

MASK = Causal() & SameSegment() & Window(9)
SEGMENTS = np.array([[0, 0, *[1] * 6, *[2] * 5], [3] * 13], np.int32)


@pytest.mark.parametrize("rows", [None, [[12, 11, -1], [4, 12, 7]]], ids=["all", "chosen"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_mass_is_the_sum_of_the_probabilities(rows, biased, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, 13, heads, 8)) for key, heads in zip(keys, (4, 2, 2), strict=False))
    bias = jax.random.normal(keys[3], (1, 4, 13, 13)) if biased else None
    segments = jnp.asarray(SEGMENTS)
    fields = TokenFields(jnp.broadcast_to(jnp.arange(13), (2, 13)), segments)
    of_both = {f"{side}_{name}": x for side in ("query", "key") for name, x in fields.present().items()}
    _, lse = softmax_attention(q, k, v, mask=MASK, bias=bias, **of_both, return_lse=True, backend="reference")
    scores = jnp.einsum("bthk,bshk->bhts", q, jnp.repeat(k, 2, axis=2)) / np.sqrt(8) + (0 if bias is None else bias)
    scores = jnp.where(MASK.dense(fields, fields)[:, None], scores, -jnp.inf)
    weights = np.nan_to_num(np.asarray(jax.nn.softmax(scores)))  # (b, h, t, s); padding sees nothing
    chosen = [range(13)] * 2 if rows is None else [[i for i in row if i >= 0] for row in rows]
    expected = np.stack([weights[row][:, list(of_row)].sum(1) for row, of_row in enumerate(chosen)])
    rows = None if rows is None else jnp.asarray(rows)
    found = key_mass(q, k, lse, mask=MASK, query_fields=fields, key_fields=fields, rows=rows, bias=bias)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert expected.sum() > 5
