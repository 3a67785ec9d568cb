"""The body of a request for completions, read and checked: OpenAI's fields (API reference, legacy "Create completion"),
as far as this server has them, and `top_k` and `min_p` beside them. What it does not have is refused, never ignored.
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from collections.abc import Sequence
from typing import Any

from recollect.configuration import UserError
from recollect.models.sampling import Sampling

MOST_CHOICES = 32
"""Prompts times `n` of one request."""

MOST_STOPS = 16
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
}
"""Fields of the protocol that change nothing at these values, the only ones that are taken."""
IGNORED = {"user", "metadata", "store", "service_tier"}


class Refused(UserError):
    """Raised for a request that cannot be served; `parameter` names the field, `status` is HTTP's."""

    def __init__(self, message: str, parameter: str | None = None, status: int = 400):
        super().__init__(message)
        self.parameter, self.status = parameter, status


@dataclasses.dataclass(frozen=True)
class Completions:
    """A request: `choices` are the prompts, each `n` times, with the sampling of each."""

    model: str
    choices: tuple[tuple[str | tuple[int, ...], Sampling], ...]
    tokens: int
    stops: tuple[str, ...]
    stream: bool
    log_probabilities: bool
    include_usage: bool


def read_completions(body: bytes, vocabulary: int) -> Completions:
    """Returns the request.

    Raises:
      Refused: it is no JSON object, or a field is unknown, of the wrong type or out of range.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused("the body is not JSON") from None
    if not isinstance(fields, dict):
        raise Refused("the body must be a JSON object")
    taken = _Fields({name: value for name, value in fields.items() if value is not None})
    stops = taken.value("stop", (str, list), [])
    stops = [stops] if isinstance(stops, str) else stops
    if len(stops) > MOST_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refused(f"stop: must be a string, or at most {MOST_STOPS}, none of them empty", "stop")
    prompts = _prompts(taken.value("prompt", (str, list), ""), vocabulary)
    count = taken.number("n", 1, least=1, whole=True)
    if len(prompts) * count > MOST_CHOICES:
        raise Refused(f"{len(prompts)} prompts times n={count}: at most {MOST_CHOICES} choices are made", "n")
    options = taken.value("stream_options", (dict,), {})
    request = Completions(
        model=taken.value("model", (str,), ""),
        choices=tuple((prompt, sampling) for prompt in prompts for sampling in _samplings(taken, count)),
        tokens=taken.number("max_tokens", 16, least=1, whole=True),
        stops=tuple(stops),
        stream=taken.value("stream", (bool,), False),
        log_probabilities=taken.number("logprobs", -1, least=0, most=1, whole=True) >= 0,
        include_usage=options.get("include_usage") is True,
    )
    taken.check_rest()
    return request


def _samplings(taken: _Fields, count: int) -> list[Sampling]:
    top_k = taken.number("top_k", 0, least=-1, whole=True)
    seed = taken.number("seed", secrets.randbits(62), least=0, most=2**62, whole=True)
    settings: dict[str, Any] = {
        "temperature": taken.number("temperature", 1.0, least=0, most=100),
        "top_p": taken.number("top_p", 1.0, least=1e-9, most=1),
        "top_k": top_k if top_k > 0 else None,
        "min_p": taken.number("min_p", 0.0, least=0, most=1),
    }
    return [Sampling(**settings, seed=seed + number) for number in range(count)]


def _prompts(prompt: str | list[Any], vocabulary: int) -> Sequence[str | tuple[int, ...]]:
    """Returns the prompts: a text, ids, or a list of texts or of ids."""
    several = [prompt] if isinstance(prompt, str) or _are_ids(prompt) else prompt
    found: list[str | tuple[int, ...]] = []
    for one in several:
        if isinstance(one, str):
            found.append(one)
        elif _are_ids(one):
            if not all(0 <= number < vocabulary for number in one):
                raise Refused(f"prompt: ids must be in [0, {vocabulary})", "prompt")
            found.append(tuple(one))
        else:
            raise Refused("prompt: must be a string, token ids, or a list of either", "prompt")
    if not found:
        raise Refused("prompt: must not be an empty list", "prompt")
    return found


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


class _Fields:
    """The fields of a body that are not null, and which of them were read."""

    def __init__(self, fields: dict[str, Any]):
        self.fields, self.read = fields, set(IGNORED)

    def value(self, name: str, kinds: tuple[type, ...], default: Any) -> Any:
        """Returns a field of one of these types."""
        self.read.add(name)
        value = self.fields.get(name, default)
        if not isinstance(value, kinds):
            raise Refused(f"{name}: must be {' or '.join(kind.__name__ for kind in kinds)}", name)
        return value

    def number(self, name: str, default: float, *, least: float, most: float = 2**31, whole: bool = False) -> Any:
        """Returns a finite number in [least, most], a whole one if asked; the default need not be."""
        self.read.add(name)
        if name not in self.fields:
            return default
        value = self.fields[name]
        fits = type(value) is int or (type(value) is float and not whole and math.isfinite(value))
        if not fits or not least <= value <= most:
            kind = "a whole number" if whole else "a number"
            low, high = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (least, most))
            raise Refused(f"{name}: must be {kind} from {low} to {high}", name)
        return value

    def check_rest(self) -> None:
        """Raises Refused where a field was not read and is not at its neutral value."""
        for name, value in self.fields.items():
            if name not in self.read and not any(value == one for one in NEUTRAL.get(name, ())):
                known = "this server takes no other value" if name in NEUTRAL else "there is no such field here"
                raise Refused(f"{name}: {known}", name)
