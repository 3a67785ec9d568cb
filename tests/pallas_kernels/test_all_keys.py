"""Linear attention to all keys of a document against masked products of all pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.pallas_kernels.linear_recurrence.all_keys import read_all_keys

QUERIES = np.array([[2, 2, 0, 7, 7, 7, 1], [4, 4, 4, 4, 4, 4, 4]])
KEYS = np.array([[7, 7, 0, 2, 2], [0, 9, 4, 4, 0]])
"""Other documents in another order: the queries of 1 have no key, and no query reads the keys of 9."""


@pytest.mark.parametrize("packed", [False, True])
def test_each_query_reads_the_sum_over_the_keys_of_its_document(packed):
    (b, t), s = QUERIES.shape, KEYS.shape[1]
    shapes = {"q": (b, t, 2, 3), "k": (b, s, 2, 3), "v": (b, s, 2, 4)}
    q, k, v = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(shapes.values()))
    same = (QUERIES[:, :, None] == KEYS[:, None]) & (QUERIES != 0)[..., None] if packed else np.ones((b, t, s), bool)
    segments = {"segment_ids": jnp.asarray(QUERIES), "key_segment_ids": jnp.asarray(KEYS)} if packed else {}

    def value(function):
        return jax.jit(jax.value_and_grad(lambda *x: (jnp.sum(jnp.sin(o := function(*x))), o), (0, 1, 2), has_aux=True))

    def pairs(q, k, v):
        scores = jnp.where(same[:, None], jnp.einsum("bthk,bshk->bhts", q, k), 0)
        return jnp.einsum("bhts,bshv->bthv", scores, v)

    (_, o), grads = value(lambda q, k, v: read_all_keys(q, k, v, **segments))(q, k, v)
    (_, expected), expected_grads = value(pairs)(q, k, v)
    np.testing.assert_allclose(o, expected, atol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, atol=1e-5)
