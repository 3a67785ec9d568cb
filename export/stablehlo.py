"""Exports a model as StableHLO programs that jax alone runs, on a CPU, a GPU or a TPU.

    forward.bin   (weights, tokens (b, t)) -> logits (b, t, z)
    prefill.bin   (weights, tokens (b, t), real (b, t) bool) -> logits (b, z) of the last token, state
    step.bin      (weights, tokens (b,), state) -> logits (b, z), state
    weights.npz   arrays by dotted name; manifest.json: sizes, which of b and t are free; example.py: greedy generation

Each program is `jax.export`'s serialisation, for several platforms at once. A state is a tuple of arrays. Batch and
length (2 or more) are symbolic where the model's operations allow it, else fixed: the manifest has the sizes. A prompt
that is shorter has padding on its left, where `real` is false. Source: the chapters on exporting and on shape
polymorphism in jax's documentation.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jaxtyping import Array, Bool, Float, Int

from recollect.configuration import UserError
from recollect.configuration.io import first_line, flatten, write_json
from recollect.export.folder import new_folder
from recollect.layers.mixer import Context
from recollect.models import FunctionalModel
from recollect.models.adaptation import nested

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAMS = ("forward", "prefill", "step")
WEIGHTS, MANIFEST, EXAMPLE = "weights.npz", "manifest.json", "example.py"
FIXED_BATCH = 1
"""Sequences of a program whose batch cannot be symbolic."""

_EXAMPLE = '''"""Generates greedily with the programs beside this file; needs jax, numpy and flatbuffers alone.

    python example.py 1 2 3        # token ids of a prompt
"""

import json
import pathlib
import sys

import numpy as np
from jax import export

HERE = pathlib.Path(__file__).parent
manifest = json.loads((HERE / "manifest.json").read_text())
weights = dict(np.load(HERE / "weights.npz"))
prefill, step = (export.deserialize(bytearray((HERE / f"{name}.bin").read_bytes())) for name in ("prefill", "step"))

prompt = [int(number) for number in sys.argv[1:]] or [0]
length = manifest["sizes"]["prefill"]["length"]
padding = max(0, (2 if length == "t" else length) - len(prompt))
real = np.array([[False] * padding + [True] * len(prompt)])
logits, state = prefill.call(weights, np.array([[0] * padding + prompt], np.int32), real)
text = []
for _ in range(min(20, manifest["maximum_length"] - len(prompt))):
    token = np.argmax(logits, axis=-1).astype(np.int32)
    text.append(int(token[0]))
    logits, state = step.call(weights, token, state)
print(*text)
'''


def export_stablehlo(
    params: dict[str, Any],
    model: FunctionalModel,
    directory: Path | str,
    *,
    maximum_length: int,
    overwrite: bool = False,
) -> list[str]:
    """Writes the programs of a model, whole or not at all; returns the names of the files.

    Args:
      maximum_length: tokens that a state has room for; also of prompts where their length cannot be symbolic.

    Raises:
      UserError: a program cannot be exported at a fixed size either, or the folder is taken.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("--format stablehlo: jax writes such programs with flatbuffers; pip install flatbuffers")
    limit = model.config.maximum_length()
    if not 2 <= maximum_length < 2**31 or (limit is not None and maximum_length > limit):
        most = "2^31 - 1" if limit is None else f"{limit}, this model's"
        raise UserError(f"max_length={maximum_length}: must be from 2 to {most}")
    weights = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
    functions = _functions(model, maximum_length)
    sizes: dict[str, Any] = {}
    with new_folder(Path(directory), _is_ours, overwrite=overwrite) as folder:
        for name in PROGRAMS:
            program, sizes[name] = _exported(name, functions, weights, maximum_length)
            (folder / f"{name}.bin").write_bytes(program.serialize())
        np.savez(folder / WEIGHTS, **weights)  # type: ignore[arg-type]
        about = {"platforms": PLATFORMS, "maximum_length": maximum_length, "vocabulary": model.vocabulary}
        write_json(folder / MANIFEST, {"format": 1, **about, "sizes": sizes, "jax": jax.__version__})
        (folder / EXAMPLE).write_text(_EXAMPLE, encoding="utf-8")
    return [*(f"{name}.bin" for name in PROGRAMS), WEIGHTS, MANIFEST, EXAMPLE]


def _functions(model: FunctionalModel, maximum_length: int) -> dict[str, Callable[..., Any]]:
    """Returns the three programs as functions of weights by dotted name."""

    def module(weights: dict[str, Array]) -> Any:
        return model.bind(nested(weights))

    def extended(
        weights: dict[str, Array], tokens: Int[Array, "b t"], state: Any, context: Context = Context()
    ) -> tuple[Float[Array, "b z"], Any]:
        bound = module(weights)
        hidden, state = bound.extend(tokens, state, context)
        return bound.logits(hidden[:, -1]), tuple(jax.tree.leaves(state))

    def forward(weights: dict[str, Array], tokens: Int[Array, "b t"]) -> Float[Array, "b t z"]:
        return module(weights)(tokens)

    def prefill(
        weights: dict[str, Array], tokens: Int[Array, "b t"], real: Bool[Array, "b t"]
    ) -> tuple[Float[Array, "b z"], Any]:
        start = module(weights).init_state(tokens.shape[0], maximum_length)
        return extended(weights, tokens, start, Context(segments=real.astype(jnp.int32)))

    def step(weights: dict[str, Array], tokens: Int[Array, " b"], state: Any) -> tuple[Float[Array, "b z"], Any]:
        like = jax.eval_shape(lambda weights: module(weights).init_state(tokens.shape[0], maximum_length), weights)
        return extended(weights, tokens[:, None], jax.tree.unflatten(jax.tree.structure(like), state))

    return {"forward": forward, "prefill": prefill, "step": step}


def _exported(name: str, functions: dict[str, Any], weights: dict[str, Any], length: int) -> tuple[Any, dict[str, Any]]:
    """Returns a program with as few fixed sizes as the model allows, and its sizes: "b" and "t", or numbers."""
    shapes = {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in weights.items()}
    problem: Exception | None = None
    attempts = (("b", "t"), ("b", length), (FIXED_BATCH, "t"), (FIXED_BATCH, length))
    for batch, tokens in attempts:
        if name == "step" and tokens != "t":
            continue
        named = f"{batch}" if name == "step" else f"{batch}, {tokens}"
        rows, *width = jax_export.symbolic_shape(named, constraints=_constraints(named, length))
        arguments: list[Any] = [shapes, jax.ShapeDtypeStruct((rows, *width), jnp.int32)]
        if name == "prefill":
            arguments.append(jax.ShapeDtypeStruct((rows, *width), jnp.bool_))
        try:
            if name == "step":
                prompt = (jax.ShapeDtypeStruct((rows, 1), dtype) for dtype in (jnp.int32, jnp.bool_))
                arguments.append(jax.eval_shape(functions["prefill"], shapes, *prompt)[1])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = jax_export.export(jax.jit(functions[name]), platforms=PLATFORMS)(*arguments)
        except Exception as error:  # whatever an operation does with a size that is no number
            problem = error
            continue
        return program, {"batch": batch} if name == "step" else {"batch": batch, "length": tokens}
    raise UserError(f"{name} cannot be exported as StableHLO: {first_line(problem or ValueError())}")


def _constraints(named: str, length: int) -> list[str]:
    """Returns what holds of the symbolic sizes in "b, t"."""
    # From 2 on: many operations handle a single token for itself.
    known = {"b": ["b >= 1"], "t": ["t >= 2", f"t <= {length}"]}
    return [each for name in named.split(", ") for each in known.get(name, [])]


def _is_ours(name: str) -> bool:
    return name in (*(f"{program}.bin" for program in PROGRAMS), WEIGHTS, MANIFEST, EXAMPLE)
