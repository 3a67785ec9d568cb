"""Laws of a mixer in a small model that is trained: five plain SGD steps, on one device and over a mesh."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import chz
import jax
import jax.numpy as jnp
import numpy as np

from recollect.layers.law_subject import LawBroken, Subject, require
from recollect.layers.mixer import Context, MixerConfig
from recollect.layers.modules.mlp import SwiGLU
from recollect.models import FunctionalModel, LanguageModel, repeat
from recollect.training.experiment import Mesh
from recollect.training.sharding import batch_sharding, make_mesh, params_sharding

ROWS, LENGTH, VOCABULARY, WIDTH = 8, 32, 24, 16

MESHES = {
    "data8": Mesh(data=8),
    "fsdp8": Mesh(fsdp=8),
    "tensor2": Mesh(tensor=2),
    "tensor4": Mesh(tensor=4),
    "sequence2": Mesh(sequence=2),
    "sequence4": Mesh(sequence=4),
    "sequence8": Mesh(sequence=8),
    "data2 fsdp2 tensor2": Mesh(data=2, fsdp=2, tensor=2),
    "data2 fsdp2 sequence2": Mesh(data=2, fsdp=2, sequence=2),
    "fsdp2 tensor2 sequence2": Mesh(fsdp=2, tensor=2, sequence=2),
    "tensor2 sequence4": Mesh(tensor=2, sequence=4),
}
"""By name."""


def documents(rows: int = ROWS, length: int = LENGTH) -> np.ndarray:
    """Returns (rows, length) segments: documents of all lengths that start anywhere, padding at the ends of rows."""
    rng = np.random.default_rng(0)
    segments = np.zeros((rows, length), np.int32)
    for row in segments:
        cuts = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
        for index, (start, end) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True)):
            row[start:end] = index + 1
    segments[0] = 1  # one document as long as its row
    return segments


def tokens_of(rows: int) -> np.ndarray:
    """Returns (rows, LENGTH + 1) random tokens."""
    return np.random.default_rng(1).integers(0, VOCABULARY, (rows, LENGTH + 1), np.int32)


@functools.lru_cache(maxsize=2)
def on_one_device(mixer: MixerConfig) -> Any:
    """Returns `five_steps` without a mesh."""
    return five_steps(mixer, None)


@functools.lru_cache(maxsize=2)
def small_model(mixer: MixerConfig) -> FunctionalModel:
    """Returns a model with one layer of the mixer."""
    stages = repeat(mixer, depth=1)
    return FunctionalModel(LanguageModel(width=WIDTH, stages=stages, mlp=SwiGLU(expansion=2)), VOCABULARY)


@functools.lru_cache(maxsize=2)
def compiled_steps(mixer: MixerConfig) -> Callable[[Any, Any], Any]:
    """Returns `steps_of` the small model, compiled for one device: laws 8 and 13 share the program."""
    return jax.jit(steps_of(small_model(mixer)))


@functools.lru_cache(maxsize=2)
def first_params(mixer: MixerConfig) -> list[Any]:
    """Returns parameters of two members, large enough that every path matters."""
    model = small_model(mixer)
    # Operation by operation: those compile once for all mixers, a program of them all for each mixer anew.
    drawn = [model.init(jax.random.key(seed)) for seed in (0, 1)]
    return jax.device_get(jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), drawn))


def packed_batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens, targets and segments, (ROWS, LENGTH) each."""
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (ROWS, LENGTH + 1), 0, VOCABULARY))
    return tokens[:, :-1], tokens[:, 1:], documents()


def five_steps(mixer: MixerConfig, mesh: Mesh | None) -> tuple[Any, Any, Any]:
    """Returns losses (5,), gradients of the first of five steps of plain SGD on packed documents, and parameters after
    them."""
    params, batch = first_params(mixer)[0], packed_batch()
    if mesh is None:
        after, (losses, gradients) = compiled_steps(mixer)(params, batch)
    else:
        model, devices = small_model(mixer), make_mesh(mesh)
        params = jax.device_put(params, params_sharding(params, model.tags("dims"), devices))
        batch = jax.device_put(batch, batch_sharding(devices))
        with jax.sharding.use_abstract_mesh(devices.abstract_mesh):
            after, (losses, gradients) = jax.jit(steps_of(model))(params, batch)
    losses, gradients, after = jax.device_get((losses, gradients, after))
    return losses, jax.tree.map(lambda leaf: leaf[0], gradients), after


def steps_of(model: FunctionalModel) -> Callable[[Any, Any], Any]:
    """Returns a function of parameters and a batch: parameters after five steps, and losses and gradients of each."""

    def loss(params: Any, tokens: jax.Array, targets: jax.Array, segments: jax.Array) -> jax.Array:
        module = model.bind(params)
        out = module.hidden(tokens, Context(segments=segments))
        logits = jax.nn.log_softmax(module.logits(out.hidden))
        nats = -jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(segments != 0, nats, 0)) / jnp.sum(segments != 0) + sum(out.losses.values())

    def run(params: Any, batch: Any) -> Any:
        def step(params: Any, _: None) -> tuple[Any, Any]:
            value, gradients = jax.value_and_grad(loss)(params, *batch)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), (value, gradients)

        return jax.lax.scan(step, params, None, length=5)

    return run


def law_8_sharded(subject: Subject) -> None:
    """Five training steps over a mesh of eight devices are those of one device, over one mesh per mixer: the name
    chooses it. Over all of them in tests/pallas_kernels/test_every_mesh.py."""
    several = [mesh for name, mesh in MESHES.items() if " " in name]
    same_as_on_one_device(subject.config, several[zlib.crc32(subject.name.encode()) % len(several)])


def same_as_on_one_device(mixer: MixerConfig, mesh: Mesh) -> None:
    """Raises LawBroken unless losses agree to 1e-5, and gradients, and parameters after five steps, to 1e-5 of a
    leaf's largest."""
    (losses, gradients, params), (expected_losses, expected_gradients, expected_params) = (
        five_steps(mixer, mesh),
        on_one_device(mixer),
    )
    over = ", ".join(f"{axis} {devices}" for axis, devices in chz.asdict(mesh).items() if devices > 1)
    if not np.allclose(losses, expected_losses, rtol=1e-5, atol=0):
        raise LawBroken(f"over a mesh of {over}, losses of five steps are {losses}; on one device {expected_losses}")
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected_gradients))
    kinds = ("gradient", gradients, expected_gradients), ("parameter after five steps", params, expected_params)
    for kind, actual, expected in kinds:
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
            # A gradient that is zero in exact arithmetic, or that is a sum whose terms cancel, is rounding in both: of
            # terms as large as the model's other gradients.
            allowed = max(1e-5 * float(np.abs(b).max()), float(np.finfo(np.float32).eps) * largest)
            off = float(np.abs(a - b).max())
            what = f"over a mesh of {over}, the {kind} of {jax.tree_util.keystr(path)} is off by {off:.1e}"
            require(off <= allowed, f"{what}, allowed {allowed:.1e}")


def law_13_members(subject: Subject) -> None:
    """Two members of a population, trained together under vmap, are two runs alone: losses to 1e-5."""
    members, batch, steps = first_params(subject.config), packed_batch(), steps_of(small_model(subject.config))
    together = jax.jit(jax.vmap(lambda params, batch: steps(params, batch)[1][0], in_axes=(0, None)))
    losses = np.asarray(together(jax.tree.map(lambda *leaves: np.stack(leaves), *members), batch))
    for number, params in enumerate(members):
        expected = np.asarray(compiled_steps(subject.config)(params, batch)[1][0])
        if not np.allclose(losses[number], expected, rtol=1e-5, atol=0):
            raise LawBroken(f"losses of member {number} of two are {losses[number]}; trained alone {expected}")


LAWS: dict[str, Callable[[Subject], None]] = {"law_8_sharded": law_8_sharded, "law_13_members": law_13_members}
"""The laws of this file by name."""
