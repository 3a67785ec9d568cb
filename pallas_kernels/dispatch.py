"""Which implementation of an operation runs.

An operation's front door hands `choose` its implementations in order of preference, each with a function that says why it cannot
serve a call (or None when it can). `backend=None` takes the first that can; naming one that cannot raises with its reason.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

BACKENDS = ("pallas_gpu", "pallas_tpu", "xla", "reference")

Refusal = str | None
Implementation = tuple[Callable[..., Any], Callable[..., Refusal]]


_preferred: contextvars.ContextVar[str | None] = contextvars.ContextVar("preferred_backend", default=None)


@contextlib.contextmanager
def preferred_backend(backend: str) -> Iterator[None]:
    """Operations traced inside, of those that leave `backend` open, run on this one if they have it (tests compare whole models so)."""
    token = _preferred.set(backend)
    try:
        yield
    finally:
        _preferred.reset(token)


def choose(
    operation: str, backend: str | None, implementations: Mapping[str, Implementation], *args: Any, **kwargs: Any
) -> Callable[..., Any]:
    """The implementation to call.

    Args:
      implementations: backend name -> (function, refuses); `refuses(*args, **kwargs)` returns a reason or None.

    Raises:
      ValueError: unknown backend, one this operation lacks, or one that refuses this call (with its reason).
    """
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"{operation}: backend={backend!r} is unknown; known are {', '.join(BACKENDS)}")
        if backend not in implementations:
            raise ValueError(f"{operation}: has no {backend} form; it has {', '.join(implementations)}")
        function, refuses = implementations[backend]
        reason = refuses(*args, **kwargs)
        if reason:
            raise ValueError(f"{operation}: {backend} cannot serve this call: {reason}")
        return function
    preferred = _preferred.get()
    names = sorted(implementations, key=lambda name: name != preferred)
    for name in names:
        function, refuses = implementations[name]
        if refuses(*args, **kwargs) is None:
            _log_choice(operation, name)
            return function
    raise ValueError(f"{operation}: no implementation serves this call")


@functools.cache
def _log_choice(operation: str, backend: str) -> None:
    logging.getLogger(__name__).info("%s runs on %s", operation, backend)


def always(*args: Any, **kwargs: Any) -> Refusal:
    """For implementations that serve every valid call."""
    return None
