"""Text as it is generated: ids become text as soon as it is certain, and stop strings end a row.

for part in continue_texts(model, params, tokenizer, ["def ", "class "], 100): print(part.row, part.text)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from recollect.configuration import UserError
from recollect.models.functional import FunctionalModel, Params
from recollect.models.generation import Generation
from recollect.models.sampling import Sampling

Finish = Literal["end", "stop", "length"]

CONTEXT = 8
"""Ids before the new ones that these are decoded with."""

LONGEST_DOUBT = 64
"""Ids that may wait for the rest of a character."""


class TextStream:
    """Turns ids that follow a prompt into text, one at a time.

    Easy to get wrong: alone, a token that begins a word loses the space before it, so ids are decoded together with
    those before them; a character may be spread over several ids, so one that is not whole yet is held back, and so is
    what could begin a stop string.

    Args:
      tokenizer: see recollect.data.tokenizers.Tokenizer.
      stops: strings that end the text, which does not hold them.

    Attributes:
      stopped: whether a stop string came.
    """

    def __init__(self, tokenizer: Any, prompt: str, ids: Sequence[int], stops: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._context, self._pending = [int(number) for number in ids[-CONTEXT:]], list[int]()
        self._shown = 0  # characters of the pending ids that were handed on
        self._held = ""
        # A tokenizer that drops the spaces at the end of a text writes one before the next word.
        self._drops_space = prompt.endswith(" ") and not tokenizer.decode(self._context).endswith(" ")

    def add(self, number: int) -> str:
        """Returns the text that is certain after one more id."""
        self._pending.append(int(number))
        text = self._decoded()
        if self._drops_space and text:
            self._drops_space, self._shown = False, int(text[0] == " ")
        # One replacement character at the end may be the beginning of a character.
        certain = max(self._shown, len(text) - text.endswith("\ufffd"))
        fresh, self._shown = text[self._shown : certain], certain
        if certain == len(text) or len(self._pending) > LONGEST_DOUBT:
            fresh += text[certain:]
            self._context, self._pending, self._shown = (self._context + self._pending)[-CONTEXT:], [], 0
        return self._checked(fresh)

    def close(self) -> str:
        """Returns what was held back, once no id follows."""
        return self._checked(self._decoded()[self._shown :]) + self._held

    def _decoded(self) -> str:
        """Returns the text of the pending ids as it reads after those before them."""
        before = self._tokenizer.decode(self._context)
        whole = self._tokenizer.decode(self._context + self._pending)
        return whole[len(before) :] if whole.startswith(before) else self._tokenizer.decode(self._pending)

    def _checked(self, fresh: str) -> str:
        """Returns what of `fresh`, after what is held, may be shown: all up to a stop string, or to what may become
        one."""
        if self.stopped:
            return ""
        text = self._held + fresh
        places = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        begun = [n for stop in self._stops for n in range(1, len(stop)) if n <= len(text) and text.endswith(stop[:n])]
        shown = len(text) - max(begun, default=0)
        self._held = text[shown:]
        return text[:shown]


@dataclasses.dataclass(frozen=True)
class TextPart:
    """What one prompt's continuation gained.

    Attributes:
      row: which prompt.
      text: new text, without the stop string.
      tokens, log_probabilities: new ids, and of each its log-probability under the model.
      finish: why nothing follows: "end" of the document, "stop" string, or "length"; None while more may follow.
    """

    row: int
    text: str
    tokens: list[int]
    log_probabilities: list[float]
    finish: Finish | None


class Continuation:
    """What follows one prompt, until its document ends, a stop string or its last token.

    Args:
      ids: of the prompt.
      tokens: to come at most.
      stops: strings that end the text, which does not hold them.

    Attributes:
      left: tokens that may still come.
    """

    def __init__(self, tokenizer: Any, prompt: str, ids: Sequence[int], tokens: int, stops: Sequence[str] = ()):
        self.left = tokens
        self._end = tokenizer.start
        self._stream = TextStream(tokenizer, prompt, ids, stops)

    def add(self, row: int, numbers: np.ndarray, log_probabilities: np.ndarray) -> TextPart:
        """Returns what new ids, at least one, give; those after a stop string are dropped."""
        text, used = "", 0
        for number in numbers:
            text, used = text + self._stream.add(number), used + 1
            if self._stream.stopped:
                break
        self.left -= used
        ended = numbers[used - 1] == self._end
        finish: Finish | None = "stop" if self._stream.stopped else "end" if ended else None if self.left else "length"
        if finish:
            self.left = 0
            text += self._stream.close()
        return TextPart(row, text, numbers[:used].tolist(), log_probabilities[:used].tolist(), finish)


def continue_texts(
    model: FunctionalModel,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[str],
    tokens: int,
    sampling: Sampling | None = None,
    stops: Sequence[str] = (),
) -> Iterator[TextPart]:
    """Yields the continuations of prompts, part by part, each row until its document ends, a stop string or its last
    token.

    Args:
      tokenizer: see recollect.data.tokenizers.Tokenizer; its start token ends a document, too.
      tokens: to generate after each prompt at most.

    Raises:
      UserError: an empty stop string, or what `Generation` refuses.
    """
    if "" in stops:
        raise UserError("stop='': an empty text is everywhere; leave it out")
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    running = Generation(model, params, ids, tokens, sampling, end=tokenizer.start)
    rows = [Continuation(tokenizer, prompt, of, tokens, stops) for prompt, of in zip(prompts, ids, strict=True)]
    for piece in running:
        for row, continuation in enumerate(rows):
            count = int(piece.counts[row])
            if not count or not continuation.left:
                continue
            part = continuation.add(row, piece.tokens[row, :count], piece.log_probabilities[row, :count])
            if part.finish:
                running.stop(row)
            yield part
