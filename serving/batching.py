"""Continuous batching: requests join and leave the rows of one decoding state while the others go on.

A request's prompt is prefilled alone, then its state is written into a free row of the state that the compiled loop
decodes; a row that is done is padding, which advances no state, until the next request takes it. Recurrent layers cost
the same however long a row has been; caches hold `context` tokens per row. A request's tokens do not depend on what
runs beside it: its random keys are numbered from its own first token.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.configuration import UserError
from recollect.models.functional import FunctionalModel, Params
from recollect.models.generation import PIECE, Generation, new_tokens, programs_of
from recollect.models.language_model import DTYPES
from recollect.models.sampling import Sampling
from recollect.models.text_generation import Continuation, TextPart

KIND = Sampling(top_k=1)
"""The compiled loop filters in every row, each by its own numbers."""


class Busy(Exception):
    """Raised for a request while as many wait as may."""


@dataclasses.dataclass
class Request:
    """One continuation to be generated.

    Attributes:
      ids: of the prompt.
      tokens: to generate at most.
      receive: called from the batcher's thread with each part, or once with the exception that ended the request.
      cancelled: set by whoever no longer wants it; its row is free after the call of the loop that runs.
    """

    ids: Sequence[int]
    tokens: int
    sampling: Sampling
    stops: Sequence[str]
    receive: Callable[[TextPart | Exception], None]
    prompt: str = ""
    cancelled: bool = False


class Batcher:
    """Runs requests on a thread of its own, from `start` to `close`.

    Args:
      tokenizer: see recollect.data.tokenizers.Tokenizer; its start token ends a document, too.
      rows: continuations that run at once.
      context: most tokens of a prompt and its continuation.
      waiting: most requests that wait for a row.

    Attributes:
      context: as given, or the longest that the model takes.
      tokenizer, vocabulary: of the model.
    """

    def __init__(
        self,
        model: FunctionalModel,
        params: Params,
        tokenizer: Any,
        *,
        rows: int = 8,
        context: int = 2048,
        waiting: int = 64,
    ):
        for name, value, least in (("rows", rows, 1), ("context", context, 2), ("waiting", waiting, 1)):
            if value < least:
                raise UserError(f"{name}={value}: must be at least {least}")
        self.context = min(context, model.config.maximum_length() or context)
        self.rows, self.waiting = rows, waiting
        self._model, self.tokenizer, self.vocabulary = model, tokenizer, model.vocabulary
        self._params = jax.tree.map(jnp.asarray, params)
        self._decode = programs_of(model, KIND).decode
        self._changed = threading.Condition()
        self._queue: collections.deque[Request] = collections.deque()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._clear()

    def start(self) -> None:
        """Compiles the loop and begins to serve."""
        self._call_loop()
        self._thread.start()

    def close(self) -> None:
        """Ends what runs and waits, each with an error, and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def encoded(self, prompt: str) -> list[int]:
        """Returns the ids of a prompt."""
        return [int(number) for number in self.tokenizer.encode(prompt)]

    def submit(self, *requests: Request) -> None:
        """Queues requests, all or none.

        Raises:
          UserError: one cannot be served whatever else runs.
          Busy: too many wait.
        """
        for request in requests:
            total = len(request.ids) + request.tokens
            if not request.ids or request.tokens < 1:
                raise UserError("a prompt of at least one token and max_tokens of at least 1 are needed")
            if total > self.context:
                raise UserError(
                    f"a prompt of {len(request.ids)} tokens and max_tokens={request.tokens} are {total} tokens; this "
                    f"server takes at most {self.context}"
                )
        with self._changed:
            if self._closed:
                raise Busy("the server is closing")
            if len(self._queue) + len(requests) > self.waiting:
                raise Busy(f"at most {self.waiting} requests may wait, and {len(self._queue)} do; try again later")
            self._queue.extend(requests)
            self._changed.notify()

    def _clear(self) -> None:
        """Makes an empty state for all rows."""
        start = programs_of(self._model, KIND).start
        one, state = (
            jax.eval_shape(lambda params, n=n: start(params, n, self.context), self._params) for n in (1, self.rows)
        )
        for few, many in zip(jax.tree.leaves(one), jax.tree.leaves(state), strict=True):
            assert few.shape[0] == 1 and many.shape[0] == self.rows, "every part of a state is by row"
        hidden = jnp.zeros((self.rows, self._model.config.width), DTYPES[self._model.config.dtype])
        self._carry = (hidden, start(self._params, self.rows, self.context), None)
        self._running: list[tuple[Request, Continuation] | None] = [None] * self.rows
        self._keys = jax.random.split(jax.random.key(0), self.rows)
        values = Sampling().values(self.vocabulary)
        self._values = {name: np.full((self.rows, 1), value) for name, value in values.items()}
        self._left, self._first = np.zeros((2, self.rows), np.int32)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self._queue and not any(self._running):
                    self._changed.wait()
                free = [row for row, held in enumerate(self._running) if held is None]
                arrivals = [(row, self._queue.popleft()) for row in free[: len(self._queue)]]
                if self._closed:
                    arrivals += [(-1, request) for request in self._queue]
                    break
            try:
                for row, request in arrivals:
                    self._admit(row, request)
                self._advance()
            except Exception as error:  # whatever it was, the state may be gone: all that ran has failed, others go on
                self._fail([request for _, request in arrivals], error)
        self._fail([request for _, request in arrivals], Busy("the server is closing"))

    def _fail(self, requests: list[Request], error: Exception) -> None:
        running = [held[0] for held in self._running if held is not None]
        for request in running + [request for request in requests if request not in running]:
            request.receive(error)
        self._clear()

    def _admit(self, row: int, request: Request) -> None:
        if request.cancelled:
            return
        alone = Generation(self._model, self._params, [request.ids], self.context - len(request.ids), KIND)
        self._carry = _written(self._carry, alone.prefill(), row)
        self._keys = self._keys.at[row].set(request.sampling.row_keys([np.asarray(request.ids)])[0])
        for name, value in request.sampling.values(self.vocabulary).items():
            self._values[name][row] = value
        if request.sampling.is_greedy:
            self._values["top_k"][row] = 1
        self._left[row], self._first[row] = request.tokens, 0
        prompt = request.prompt or self.tokenizer.decode(request.ids)
        continuation = Continuation(self.tokenizer, prompt, request.ids, request.tokens, request.stops)
        self._running[row] = (request, continuation)

    def _advance(self) -> None:
        for row, held in enumerate(self._running):
            if held is not None and held[0].cancelled:
                self._release(row)
        if not self._left.any():
            return
        before = self._left
        tokens, log_probabilities = self._call_loop()
        for row, count in enumerate(new_tokens(tokens, before, self.tokenizer.start)):
            held = self._running[row]
            if held is None or not count:
                continue
            request, continuation = held
            part = continuation.add(row, tokens[row, :count], log_probabilities[row, :count])
            if part.finish:
                self._release(row)
            request.receive(part)

    def _release(self, row: int) -> None:
        self._running[row] = None
        self._left[row] = 0

    def _call_loop(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the next tokens of every row, and their log-probabilities."""
        end = -1 if self.tokenizer.start is None else self.tokenizer.start
        arguments = (self._keys, self._values, self._left, self._first, end)
        self._carry, drawn, left = self._decode(self._params, self._carry, *arguments)
        tokens, log_probabilities, _ = jax.device_get(drawn)
        self._left, self._first = np.array(left), self._first + PIECE
        return tokens, log_probabilities


@functools.partial(jax.jit, donate_argnums=0)
def _written(carry: Any, one: Any, row: Any) -> Any:
    """Returns the carry of the loop with that of one request in a row."""
    return jax.tree.map(lambda whole, part: whole.at[row].set(part[0].astype(whole.dtype)), carry, one)
