"""The endpoint: GET /v1/models and POST /v1/completions, streamed (server-sent events) or whole, by starlette."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from recollect.configuration import UserError
from recollect.models.text_generation import TextPart
from recollect.serving.batching import Batcher, Busy, Request
from recollect.serving.completions import Completions, Refused, read_completions

LARGEST_BODY = 4 * 2**20
FINISH = {"end": "stop", "stop": "stop", "length": "length"}
LOOKED_FOR = 0.25
"""Seconds between checks that a waiting client is still connected."""


@dataclasses.dataclass
class _Choice:
    """What one choice has so far."""

    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probabilities: list[float] = dataclasses.field(default_factory=list)
    finish: str | None = None


def application(batcher: Batcher, name: str) -> Starlette:
    """Returns the ASGI application of a batcher that runs, whose model clients call `name`.

    Requests for other hosts than the local one are refused: a web page could send them by a name that it made point
    here.
    """
    endpoint = Endpoint(batcher, name)
    return Starlette(
        routes=[
            Route("/v1/models", endpoint.models),
            Route("/v1/models/{name:path}", endpoint.model),
            Route("/v1/completions", endpoint.completions, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])],
        exception_handlers={404: _not_found, 405: _not_found},
    )


class Endpoint:
    """The endpoint of one model."""

    def __init__(self, batcher: Batcher, name: str):
        self.batcher, self.name = batcher, name
        self.begun = int(time.time())

    async def models(self, request: HttpRequest) -> Response:
        """Lists the model."""
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: HttpRequest) -> Response:
        """Describes the model."""
        if request.path_params["name"] != self.name:
            return _error(Refused(f"there is no model {request.path_params['name']!r} here", "model", 404))
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.begun, "owned_by": "recollect"}

    async def completions(self, request: HttpRequest) -> Response:
        """Continues prompts."""
        try:
            asked = read_completions(await _body(request), self.batcher.vocabulary)
            if asked.model not in ("", self.name):
                raise Refused(f"there is no model {asked.model!r} here; it is {self.name!r}", "model", 404)
            running = _Running(self.batcher, asked)
        except (UserError, Busy) as error:
            return _error(error)
        except ClientDisconnect:
            return Response(status_code=499)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        head["model"] = self.name
        if asked.stream:
            events = self._events(running, asked, head)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        return await self._whole(running, asked, head, request)

    async def _events(self, running: _Running, asked: Completions, head: dict[str, Any]) -> AsyncIterator[str]:
        with running:  # left by an exception where the client went away
            async for part in running.parts():
                if isinstance(part, Exception):
                    yield _event(_described_error(part)[1])
                    return
                choice = _Choice(part.text, part.tokens, part.log_probabilities, part.finish)
                yield _event({**head, "choices": [self._choice(part.row, choice, asked)]})
            if asked.include_usage:
                yield _event({**head, "choices": [], "usage": running.usage()})
            yield "data: [DONE]\n\n"

    async def _whole(
        self, running: _Running, asked: Completions, head: dict[str, Any], request: HttpRequest
    ) -> Response:
        choices = [_Choice() for _ in asked.choices]
        with running:
            async for part in running.parts(request):
                if isinstance(part, Exception):
                    return _error(part)
                choice = choices[part.row]
                choice.text += part.text
                choice.tokens += part.tokens
                choice.log_probabilities += part.log_probabilities
                choice.finish = part.finish
        shown = [self._choice(index, choice, asked) for index, choice in enumerate(choices)]
        return JSONResponse({**head, "choices": shown, "usage": running.usage()})

    def _choice(self, index: int, choice: _Choice, asked: Completions) -> dict[str, Any]:
        shown: dict[str, Any] = {"index": index, "text": choice.text, "logprobs": None}
        shown["finish_reason"] = FINISH.get(choice.finish or "")
        if asked.log_probabilities:
            names = [self.batcher.tokenizer.decode([number]) for number in choice.tokens]
            shown["logprobs"] = {"tokens": names, "token_logprobs": choice.log_probabilities}
            shown["logprobs"] |= {"top_logprobs": None, "text_offset": None}
        return shown


class _Running:
    """The choices of one request, in the batcher; those that are left undone are cancelled.

    Raises:
      UserError, Busy: what `Batcher.submit` refuses; then none of them runs.
    """

    def __init__(self, batcher: Batcher, asked: Completions):
        self._parts: asyncio.Queue[TextPart | Exception] = asyncio.Queue()
        self._left, self._generated = len(asked.choices), 0
        loop = asyncio.get_running_loop()

        def received(index: int, part: TextPart | Exception) -> None:
            if isinstance(part, TextPart):
                part = dataclasses.replace(part, row=index)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(self._parts.put_nowait, part)

        self._requests = []
        for index, (prompt, sampling) in enumerate(asked.choices):
            text, ids = (prompt, batcher.encoded(prompt)) if isinstance(prompt, str) else ("", prompt)
            self._requests.append(
                Request(ids, asked.tokens, sampling, asked.stops, functools.partial(received, index), text)
            )
        self._prompt_tokens = sum(len(request.ids) for request in self._requests)
        batcher.submit(*self._requests)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for request in self._requests:
            request.cancelled = True

    async def parts(self, request: HttpRequest | None = None) -> AsyncIterator[TextPart | Exception]:
        """Yields the parts of all choices as they come, until all are done, one failed, or the client of `request` is
        gone."""
        while self._left:
            try:
                part = await asyncio.wait_for(self._parts.get(), LOOKED_FOR)
            except TimeoutError:
                if request is not None and await request.is_disconnected():
                    return
                continue
            if isinstance(part, TextPart):
                self._left -= part.finish is not None
                self._generated += len(part.tokens)
            yield part

    def usage(self) -> dict[str, int]:
        """Returns the numbers of tokens."""
        total = self._prompt_tokens + self._generated
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._generated,
            "total_tokens": total,
        }


async def _body(request: HttpRequest) -> bytes:
    """Returns the body.

    Raises:
      Refused: it is larger than LARGEST_BODY; no more than that is read.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST_BODY:
            raise Refused(f"the body is larger than {LARGEST_BODY:,} bytes", status=413)
        parts.append(part)
    return b"".join(parts)


def _described_error(error: Exception) -> tuple[int, dict[str, Any]]:
    status = error.status if isinstance(error, Refused) else 503 if isinstance(error, Busy) else 400
    if not isinstance(error, UserError | Busy):
        status = 500
    kind = "invalid_request_error" if status < 500 else "server_error"
    parameter = error.parameter if isinstance(error, Refused) else None
    message = str(error) if status != 500 else f"the request failed: {type(error).__name__}"
    return status, {"error": {"message": message, "type": kind, "param": parameter, "code": None}}


def _error(error: Exception) -> Response:
    status, described = _described_error(error)
    return JSONResponse(described, status_code=status)


async def _not_found(request: HttpRequest, error: Any) -> Response:
    message = f"{request.method} {request.url.path}: there are GET /v1/models and POST /v1/completions"
    return _error(Refused(message, status=error.status_code))


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
