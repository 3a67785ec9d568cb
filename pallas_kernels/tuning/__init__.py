"""Block sizes of kernels: measured ones from this folder's tables, one JSON file a kind of device, else what the
operation reckons.

A kernel asks when it is traced:

    sizes = block_sizes("linear_recurrence.gpu_walk", heuristic, dtype="bfloat16", decay="head", k=64, v=64, t=4096)

where `heuristic(dtype=..., decay=..., ...)` is its cheap heuristic. A table's entry serves where all of its key is equal,
but for counts of sequences, tokens and heads (b, t, h): among entries that differ in those alone the nearest serves, by
the sum of |log2(ratio)|, the first of equals. A kernel whose sizes a count limits must bound what it gets.

Tables hold only what `python -m recollect.pallas_kernels.tuning.measure` measured on that device; it rewrites the table
of the device it runs on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.tuning import tables
from recollect.pallas_kernels.tuning.tables import Key, Sizes

# Part of what jax keeps traces by, so that a jitted helper is traced again for other sizes.
_forced: Any = jax.make_user_context(None)
_in_force: dict[tuple[tuple[str, Any], ...], Mapping[str, Sizes]] = {}


def block_sizes(operation: str, heuristic: Callable[..., Sizes], **key: str | int | bool) -> Sizes:
    """The sizes to run a kernel with on the device that is traced for.

    Args:
      operation: which kernel, "OPERATION.KERNEL".
      heuristic: heuristic(**key) -> sizes by name; it serves where no table does.
      key: what sizes depend on; dtypes by name.

    Raises:
      ValueError: a table's entry and the heuristic do not name the same sizes.
    """
    defaults = heuristic(**key)
    sizes = _now().get(operation) or tables.find(dispatch.device().kind, operation, key)
    if sizes is None:
        return defaults
    if sizes.keys() != defaults.keys():
        raise ValueError(
            f"{operation}: the table of {dispatch.device().kind} names {sorted(sizes)}; the kernel takes {sorted(defaults)}"
        )
    return dict(sizes)


@contextlib.contextmanager
def forced(**sizes: Sizes) -> Iterator[None]:
    """Kernels traced inside run with these sizes: forced(**{"linear_recurrence.gpu_walk": {"chunk": 64}})."""
    key = tuple((operation, tuple(sorted(named.items()))) for operation, named in sorted(sizes.items()))
    _in_force[key] = sizes
    with _forced(key):
        yield


def _now() -> Mapping[str, Sizes]:
    return _in_force.get(_forced.value, {})


__all__ = ["Key", "Sizes", "block_sizes", "forced"]
