"""Shardings: the table of rules, states of any optimizer, a text step from end to end, and what devices exchange. Every
mixer over a mesh is law 8 of training/laws.py, over every mesh
tests/pallas_kernels/test_every_mesh.py."""

import dataclasses
import re

import chz
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from recollect.configuration import UserError, apply_overrides
from recollect.cost.hlo_cost import group_size
from recollect.cost.hlo_parser import bytes_of
from recollect.data.batch import Batch
from recollect.layers.packing import document_positions
from recollect.models.functional import flatten, nest
from recollect.pallas_kernels.gated_convolution import short_convolution
from recollect.pallas_kernels.linear_recurrence import linear_recurrence
from recollect.pallas_kernels.softmax_attention import softmax_attention
from recollect.pallas_kernels.taylor_attention import taylor_attention
from recollect.training.experiment import Mesh
from recollect.training.host_batches import train_on
from recollect.training.laws import documents
from recollect.training.sharding import batch_shardings, make_mesh, spec_of, state_sharding
from recollect.training.step import Program, member_values
from tests.training.tiny import tiny


@pytest.mark.parametrize(
    ("dims", "shape", "spec"),
    [
        ("z d", (24, 16), P("tensor", "fsdp")),
        ("z d", (33, 16), P(None, "fsdp")),  # 4 does not divide 33 words
        ("t d", (24, 16), P(None, "fsdp")),
        ("d z", (16, 24), P("fsdp", "tensor")),
        ("d hk", (3, 16, 32), P(None, "fsdp", "tensor")),
        ("d hk", (3, 16, 6), P(None, "fsdp", None)),
        ("hv d", (3, 32, 16), P(None, "tensor", "fsdp")),
        ("d f", (3, 16, 64), P(None, "fsdp", "tensor")),
        ("f d", (3, 64, 16), P(None, "tensor", "fsdp")),
        ("d r", (3, 16, 8), P(None, "fsdp", None)),
        ("h k k", (3, 4, 8, 8), P(None, "tensor", None, None)),
        ("u f", (3, 64, 16), P(None, "fsdp", "tensor")),
        ("u u", (3, 64, 64), P(None, None, None)),
        ("t f", (3, 128, 16), P(None, "fsdp", "tensor")),
        ("w f", (3, 4, 16), P(None, None, "tensor")),
        ("d", (3, 16), P(None, None)),
        ("d", (16,), P(None)),
    ],
)
def test_rules(dims, shape, spec):
    assert spec_of(dims, shape, make_mesh(Mesh(fsdp=2, tensor=4))) == spec


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(UserError, match="asks for 64 devices"):
        make_mesh(Mesh(data=64))


def test_a_length_that_the_axis_does_not_divide_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"run\.mesh\.sequence=3 does not divide the data's 16 tokens.* is 15"):
        tiny(tmp_path, mesh=Mesh(sequence=3))


def test_batches_are_split_by_rows_and_tokens():
    mesh = make_mesh(Mesh(data=2, fsdp=2, sequence=2))
    batch = Batch(
        *(jax.ShapeDtypeStruct((8, size), jnp.int32) for size in (16, 3)),
        None,
        jax.ShapeDtypeStruct((8, 3), jnp.float32),
    )
    found = batch_shardings(batch, mesh)
    assert found.tokens.spec == P(("data", "fsdp"), "sequence")
    assert found.targets.spec == found.weights.spec == P(("data", "fsdp"), None)  # three labelled positions stay whole


def test_any_optimizers_state_is_split_like_the_parameters():
    """Also one that leaves parameters out (a label a parameter), and a running average."""
    params = nest(
        {
            ("embedding",): jnp.zeros((8, 8)),
            ("mixer", "query", "kernel"): jnp.zeros((8, 8)),
            ("norm", "gain"): jnp.zeros(8),
        }
    )
    dims = nest({("embedding",): "z d", ("mixer", "query", "kernel"): "d hk", ("norm", "gain"): "d"})
    labels = nest({("embedding",): "a", ("mixer", "query", "kernel"): "b", ("norm", "gain"): "a"})
    transform = optax.partition({"a": optax.adamw(1e-3), "b": optax.sgd(1e-3, momentum=0.9)}, labels)
    mesh = make_mesh(Mesh(fsdp=2, tensor=2))
    state = {"params": params, "opt_state": transform.init(params), "ema": params, "step": jnp.zeros((), jnp.int32)}
    found = state_sharding(jax.eval_shape(lambda: state), dims, mesh)
    kernels, others = [], []
    for path, sharding in jax.tree_util.tree_leaves_with_path(found):
        (kernels if jax.tree_util.keystr(path).endswith("['mixer']['query']['kernel']") else others).append(
            sharding.spec
        )
    assert kernels == [P("fsdp", "tensor")] * 3  # the parameter, its momentum and its average
    assert (
        others.count(P("tensor", "fsdp")) == 4 and P() in others
    )  # the embedding, its two moments and its average; counts
    assert jax.tree.structure(found) == jax.tree.structure(state)


def host_batch(length=16, rows=16, vocabulary=32, steps=4):
    """`steps` batches of packed documents."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (steps, rows, length + 1)).astype(np.int32)
    segments = np.stack([documents(rows, length)] * steps)
    return Batch(tokens[..., :-1], tokens[..., 1:], None, (segments != 0).astype(np.float32), segments)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_on_packed_text_equal_those_on_one_device(tmp_path, accumulate):
    """The program's own steps, its optimizer's too: losses of four AdamW steps, and the parameters that have a
    gradient to speak of."""
    ends = []
    for mesh in (Mesh(), Mesh(fsdp=2, tensor=2, sequence=2)):
        experiment = tiny(tmp_path, mesh=mesh, accumulate=accumulate, learning_rate=1e-3)
        program = Program(experiment)
        state, metrics = train_on(program, program.init(0), member_values([experiment], False), host_batch())
        ends.append(jax.device_get((state["params"], metrics["loss"], metrics["gradient_norm"])))
        if mesh.devices > 1:
            kernel = flatten(state["params"])["stack.stages.0.1.mixer.query.kernel"]
            assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 4}, (
                "fsdp and tensor split it"
            )
    (params, *numbers), (found, *found_numbers) = ends
    np.testing.assert_allclose(found_numbers, numbers, rtol=1e-4)
    # Adam turns a gradient that is rounding into a full step of 1e-3 of either sign: most parameters agree far better.
    errors = np.concatenate(
        [np.ravel(np.abs(a - b)) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True)]
    )
    assert np.quantile(errors, 0.99) < 1e-5


def test_a_recall_task_trains_over_a_sequence_axis(tmp_path):
    experiment = tiny(tmp_path, mesh=Mesh(data=2, tensor=2, sequence=2))
    one, many = Program(chz.replace(experiment, run=chz.replace(experiment.run, mesh=Mesh()))), Program(experiment)
    part = experiment.data.train_slices()[0]
    values = member_values([experiment], False)
    losses = [np.asarray(program.train(program.init(0), values, 3, part)[1]["loss"]) for program in (one, many)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """What a program's collectives give each device. kinds: instruction -> bytes."""

    kinds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\((.*)"
)


def exchanged(text: str) -> Exchanged:
    """Of a compiled program's text."""
    kinds: dict[str, float] = {}
    for shapes, kind, rest in COLLECTIVE.findall(text):
        if kind != "collective-permute" and group_size(rest) == 1:
            continue  # a device alone exchanges nothing
        kinds[kind] = kinds.get(kind, 0) + bytes_of(shapes, everywhere=True)
    return Exchanged(kinds)


def exchanged_by(operation, length):
    """Of `operation` on packed documents and its gradients, tokens split over eight devices."""
    mesh = make_mesh(Mesh(sequence=8))
    x = jax.ShapeDtypeStruct((2, length, 2, 4), jnp.float32, sharding=NamedSharding(mesh, P(None, "sequence")))
    segments = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=NamedSharding(mesh, P(None, "sequence")))

    def loss(q, k, v, segments):
        return jnp.sum(jnp.sin(operation(q, k, v, segments)))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return exchanged(jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, segments).compile().as_text())


def of_window(q, k, v, segments):
    return softmax_attention(q, k, v, window=4, query_segments=segments)


def of_channels(q, k, v, segments):
    x, gate = (y.reshape(*y.shape[:2], -1) for y in (q, k))
    return short_convolution(
        x, jnp.ones((3, x.shape[2])), in_gate=gate, out_gate=v.reshape(x.shape), segment_ids=segments
    )[0]


@pytest.mark.parametrize(
    "operation",
    [
        of_window,
        of_channels,
        lambda q, k, v, segments: linear_recurrence(q, k, v, log_decay=jnp.full(2, -0.1), segment_ids=segments)[0],
        lambda q, k, v, segments: taylor_attention(q, k, v, segment_ids=segments)[0],
    ],
    ids=["window", "short convolution", "linear recurrence", "taylor"],
)
def test_what_devices_exchange_does_not_grow_with_the_length(operation):
    short, long = exchanged_by(operation, 64), exchanged_by(operation, 256)
    assert short.kinds == long.kinds and short.total > 0


def test_full_attention_exchanges_keys_and_values_once():
    """Gathered forwards, their gradients summed into parts on the way back: nothing else that grows with the length
    but segments and positions."""

    def operation(q, k, v, segments):
        return softmax_attention(q, k, v, query_segments=segments, query_positions=document_positions(segments))

    whole = 2 * 64 * 2 * 4 * 4  # bytes of keys, and of values
    found = exchanged_by(operation, 64).kinds
    assert 2 * whole <= found["all-gather"] <= 2 * whole + 8 * 2 * 64 * 4


def test_low_rank_updates_are_split_like_the_maps_that_they_update(tmp_path):
    """By the letters of the map's inputs and outputs, the rank whole; the losses are those of one device."""
    ends = []
    for mesh in (Mesh(), Mesh(fsdp=2, tensor=2)):
        experiment = apply_overrides(tiny(tmp_path, mesh=mesh, learning_rate=1e-3), ["model.lora=LoRA"])
        program = Program(experiment)
        state = program.init(0)
        if mesh.devices > 1:
            query = state["params"]["lora"]["stack"]["stages"]["0"]["1"]["mixer"]["query"]
            assert query["a"].sharding.spec == P(None, "fsdp", None) and query["b"].sharding.spec[-1] == "tensor"
        state, metrics = program.train(state, member_values([experiment], False), 3, experiment.data.slice_for(0, 0))
        ends.append(np.asarray(metrics["loss"]))
    np.testing.assert_allclose(*ends, rtol=1e-5)
