"""The chunked cross-entropy against its definition: values, every gradient, memory, and under a mesh."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from recollect.pallas_kernels.linear_cross_entropy import linear_cross_entropy
from recollect.pallas_kernels.linear_cross_entropy.chunks import chunk_of


def arrays(b, t, d, v, dtype=jnp.float64, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (b, t, d), jnp.float32).astype(dtype)
    kernel = jax.random.normal(keys[1], (d, v), jnp.float32) / d**0.5
    weights = jax.random.uniform(keys[2], (b, t)).at[0, 0].set(0)
    targets = jax.random.randint(keys[3], (b, t), 0, v)
    return hidden, kernel.astype(jnp.promote_types(dtype, jnp.float32)), targets, weights.astype(kernel.dtype)


def all_of(hidden, kernel, targets, weights, factor=1.7, **settings):
    """Values, and the gradients of `factor` times the total to hidden, kernel and weights."""

    def scaled(hidden, kernel, weights):
        found = linear_cross_entropy(hidden, kernel, targets, weights, **settings)
        return factor * found.total, found

    gradients, found = jax.jit(jax.grad(scaled, argnums=(0, 1, 2), has_aux=True))(hidden, kernel, weights)
    return found, gradients


def assert_near(found, expected, bound):
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == two.shape
        one, two = np.asarray(one, np.float64), np.asarray(two, np.float64)
        assert np.sqrt(np.mean((one - two) ** 2)) <= bound * max(np.sqrt(np.mean(two**2)), 1e-30)


@pytest.mark.parametrize(
    ("shape", "chunk", "z_loss"),
    [((2, 8, 6, 11), 4, 0.1), ((1, 7, 5, 257), 3, 0.0), ((3, 5, 4, 2), 100, 0.1), ((2, 3, 8, 33), 1, 1e-4)],
)
def test_values_and_gradients_are_the_definition_s(shape, chunk, z_loss):
    with jax.enable_x64(True):
        inputs = arrays(*shape)
        found = all_of(*inputs, z_loss=z_loss, chunk=chunk, backend="xla")
        expected = all_of(*inputs, z_loss=z_loss, backend="reference")
        assert_near(found, expected, 1e-12)
        assert found[0].total.dtype == jnp.float64
        # By hand, from the probabilities.
        hidden, kernel, targets, weights = map(np.asarray, inputs)
        logits = hidden @ kernel
        lse = np.log(np.exp(logits).sum(-1))
        loss = lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        assert float(found[0].total) == pytest.approx(float(np.sum(weights * (loss + z_loss * lse**2))), rel=1e-10)


def test_values_without_gradients_are_the_same():
    inputs = arrays(2, 9, 8, 40, jnp.float32)
    plain = linear_cross_entropy(*inputs, z_loss=1e-4, chunk=5)
    assert_near(plain, all_of(*inputs, z_loss=1e-4, chunk=5)[0], 1e-7)


def test_ties_are_wrong_and_weightless_targets_have_losses_but_no_slopes():
    hidden, kernel, targets, weights = arrays(2, 4, 6, 9, jnp.float32)
    found, gradients = all_of(jnp.zeros_like(hidden), kernel, targets, weights, chunk=3)
    assert not found.correct.any() and np.allclose(found.loss, np.log(9))
    found, gradients = all_of(hidden, kernel, targets, weights, chunk=3)
    assert (
        float(jnp.abs(gradients[0][0, 0]).max()) == 0
        and float(found.loss[0, 0]) > 0
        and float(jnp.abs(gradients[0][0, 1]).max()) > 0
    )
    best = jnp.argmax(hidden @ kernel, axis=-1)
    assert linear_cross_entropy(hidden, kernel, best, weights, chunk=3).correct.all()


def test_only_the_total_has_gradients():
    hidden, kernel, targets, weights = arrays(1, 4, 3, 5, jnp.float32)
    for backend in ("xla", "reference"):

        def loss(hidden, backend=backend):
            found = linear_cross_entropy(hidden, kernel, targets, weights, chunk=2, backend=backend)
            return jnp.sum(found.loss + found.lse)

        assert not np.asarray(jax.jit(jax.grad(loss))(hidden)).any()


def test_bf16_stays_near_fp32():
    """Products of bf16 operands; logits, sums and the kernel's gradient in fp32: 2^-8 an operand, rounded once more
    in the gradients."""
    hidden, kernel, targets, weights = arrays(2, 32, 64, 500, jnp.bfloat16)
    found = all_of(hidden, kernel, targets, weights, z_loss=1e-4, chunk=16)
    expected = all_of(
        hidden.astype(jnp.float32),
        kernel.astype(jnp.bfloat16).astype(jnp.float32),
        targets,
        weights,
        z_loss=1e-4,
        chunk=16,
    )
    assert_near(found[0][:3], expected[0][:3], 1e-5)
    assert_near(found[1], expected[1], 2**-8)
    assert [gradient.dtype for gradient in found[1]] == [jnp.bfloat16, jnp.float32, jnp.float32]


def test_memory_does_not_grow_with_the_logits():
    def temporary(tokens, vocabulary, **settings):
        shapes = [(1, tokens, 16), (16, vocabulary), (1, tokens), (1, tokens)]
        inputs = [
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in zip(shapes, (jnp.float32, jnp.float32, jnp.int32, jnp.float32), strict=True)
        ]
        return (
            jax.jit(functools.partial(all_of, **settings)).lower(*inputs).compile().memory_analysis().temp_size_in_bytes
        )

    logits = 4 * 1024 * 4096
    assert temporary(1024, 4096, backend="reference") >= logits
    few, many = temporary(256, 4096, chunk=64), temporary(1024, 4096, chunk=64)
    # Beside a chunk's logits: the kernel and its gradient, and a few vectors a target.
    assert many < logits / 4 and many - few <= 768 * 16 * 4 * 6


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "sequence": 4}, {"tensor": 8}])
def test_under_a_mesh_every_device_takes_its_own_targets(sizes):
    axes = ("data", "fsdp", "tensor", "sequence")
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()).reshape([sizes.get(axis, 1) for axis in axes]), axes, axis_types=(AxisType.Auto,) * 4
    )
    inputs = arrays(4, 8, 14, 40, jnp.float32)
    expected = all_of(*inputs, z_loss=0.01, chunk=3)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = (
            jax.jit(functools.partial(all_of, z_loss=0.01, chunk=3))
            .lower(*jax.device_put(inputs, NamedSharding(mesh, PartitionSpec())))
            .compile()
        )
        found = compiled(*jax.device_put(inputs, NamedSharding(mesh, PartitionSpec())))
    assert_near(found, expected, 1e-6)
    # 32 targets over 8 devices are 4 each: chunks of 2, so no device multiplies more rows by the kernel.
    assert "f32[2,40]" in compiled.as_text() and "f32[3,40]" not in compiled.as_text()


def test_a_mesh_that_divides_nothing_still_computes():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    inputs = arrays(3, 5, 6, 40, jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        found = jax.jit(functools.partial(all_of, chunk=4))(
            *jax.device_put(inputs, NamedSharding(mesh, PartitionSpec()))
        )
    assert_near(found, all_of(*inputs, chunk=4), 1e-6)


def test_the_kernel_is_gathered_in_bf16():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(8), ("fsdp",), axis_types=(AxisType.Auto,))
    hidden, kernel, targets, weights = arrays(8, 4, 16, 40, jnp.bfloat16)
    rows, split = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec("fsdp"))
    placed = [
        jax.device_put(x, place)
        for x, place in zip((hidden, kernel, targets, weights), (rows, split, rows, rows), strict=True)
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(functools.partial(all_of, chunk=4)).lower(*placed).as_text()
    gathers = [line for line in text.splitlines() if "all_gather" in line]
    assert len(gathers) == 1 and "bf16" in text[text.index("all_gather") : text.index("all_gather") + 600]
    assert "reduce_scatter" in text


def test_chunks_fit_their_memory():
    assert chunk_of(100, 50_000) == 100 and chunk_of(10**6, 50_257) == 1024 and chunk_of(10**6, 256) == 8192
    assert chunk_of(10**6, 10**6) == 256  # below that the kernel's gradient is what moves


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": jnp.zeros((2, 3))}, "hidden must have three dimensions"),
        ({"kernel": jnp.zeros((5, 7))}, r"kernel must be \(4, v\)"),
        ({"targets": jnp.zeros((2, 4), jnp.int32)}, r"targets must be \(2, 3\)"),
        ({"targets": jnp.zeros((2, 3))}, "targets must be integers"),
        ({"weights": jnp.zeros((3,))}, r"weights must be \(2, 3\)"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"z_loss": -1.0}, "z_loss must not be negative"),
        ({"backend": "pallas_tpu"}, "has no backend pallas_tpu"),
    ],
)
def test_mistakes_are_named(change, message):
    call = {
        "hidden": jnp.zeros((2, 3, 4)),
        "kernel": jnp.zeros((4, 7)),
        "targets": jnp.zeros((2, 3), jnp.int32),
        "weights": jnp.ones((2, 3)),
    }
    call |= change
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(linear_cross_entropy)(**call)
