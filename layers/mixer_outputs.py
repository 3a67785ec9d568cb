"""Checks that a mixer returns what the contract says, before anything is compiled: with the line of the user's file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from recollect.configuration import UserError
from recollect.configuration.python_files import errors_named, file_of
from recollect.layers.context import Context, Source
from recollect.layers.mixer import Mixer, MixerConfig, MixerOutput, Place

ROWS, TOKENS = 2, 8


def check_outputs(config: MixerConfig, width: int) -> None:
    """Builds and calls a mixer with shapes alone.

    Raises:
      UserError: it does not return what `layers.mixer` says, or its code fails; file, line, what it returned and what
        was expected are named.
    """
    tokens = min(TOKENS, config.traits.maximum_length or TOKENS)
    x = jax.ShapeDtypeStruct((ROWS, tokens, width), jnp.float32)
    file = file_of(type(config))

    def run(x: jax.Array) -> None:
        called = _Called({str(path) for path in file.digests} if file else set())
        rngs = nnx.Rngs(params=jax.random.key(0))
        mixer = called(lambda: config.build(width, Place(0, 1), rngs))
        called.require(isinstance(mixer, Mixer), _text(mixer), "a module derived from layers.mixer.Mixer")
        start = "init_cross_state" if config.traits.cross else "init_state"
        for name in ("__call__", start, "extend") if config.traits.streams else ("__call__",):
            if getattr(type(mixer), name) is getattr(Mixer, name):
                either = "" if name == "__call__" else ", or give the config traits with streams=False"
                raise UserError(
                    f"{file.path if file else config}: {type(mixer).__name__} lacks {name}; write it{either}"
                )
        source = Source(x, Context()) if config.traits.cross else None
        _check_output(called, called(lambda: mixer(x, Context(source=source))), x, "MixerOutput")
        if not config.traits.streams:
            return
        state = called(lambda: mixer.init_cross_state(source) if source else mixer.init_state(ROWS, tokens))
        pair = called(lambda: mixer.extend(x, state))
        called.require(isinstance(pair, tuple) and len(pair) == 2, _text(pair), "a pair (MixerOutput, state)")
        _check_output(called, pair[0], x, "a pair whose first is MixerOutput")
        before, after = _shapes(state), _shapes(pair[1])
        called.require(before == after, f"the state {after}", f"one of the structure of init_state, {before}")

    with errors_named(file):
        jax.eval_shape(run, x)


def _check_output(called: _Called, out: Any, x: jax.Array, kind: str) -> None:
    expected = f"{kind} with hidden {_text(x)} (rows, tokens, width)"
    called.require(isinstance(out, MixerOutput), _text(out), expected)
    called.require(_text(out.hidden) == _text(x), f"MixerOutput with hidden {_text(out.hidden)}", expected)
    for name in ("losses", "metrics"):
        entries = getattr(out, name)
        scalars = isinstance(entries, dict) and all(jnp.shape(one) == () for one in entries.values())
        shown = {key: _text(one) for key, one in entries.items()} if isinstance(entries, dict) else _text(entries)
        called.require(scalars, f"MixerOutput with {name} {shown}", f"{name} to be a dict of scalars")


class _Called:
    """Calls functions, and keeps where code in files of the user's returned last."""

    def __init__(self, files: set[str]):
        self.files = files
        self.place = ""

    def __call__(self, function: Callable[[], Any]) -> Any:
        before = sys.getprofile()
        self.place = ""

        def watch(frame: Any, event: str, argument: Any) -> None:
            if event == "return" and frame.f_code.co_filename in self.files:
                self.place = f"{frame.f_code.co_filename}, line {frame.f_lineno}: {frame.f_code.co_qualname}"

        sys.setprofile(watch)
        try:
            return function()
        finally:
            sys.setprofile(before)

    def require(self, holds: bool, got: str, expected: str) -> None:
        """Raises UserError unless what was returned last is right."""
        if not holds:
            raise UserError(f"{self.place or 'the mixer'} returned {got}; expected {expected}")


def _text(value: Any) -> str:
    """Returns dtype and shape of an array, the type of others."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{tuple(value.shape)}"
    return f"{type(value).__name__}"


def _shapes(state: Any) -> str:
    return str(jax.tree.map(_text, state))
