"""Questions about grids of coloured shapes: a stream of text and of cells, which are tokens of another type.

    tokens   [a.red] [ ] [ ] [b.blue] | filler | COLOUR? . b | SHAPE? row0 col0 | COUNT? . red
    label                                                 blue                a              1

A cell holds one object, a shape in a colour, or nothing; it is one token. No shape appears twice in an example, so
that "the colour of shape s" has one answer wherever it stands; "the shape at row, column" is asked of one grid only,
and "how many are of colour c" counts over all grids. Each question is labelled at its last token, which is what it asks
about, and no answer enters the stream. With the questions first, each has a number, and the numbers follow the grids,
each labelled with its answer.

Beside the tokens a batch has their types, PERCEPT for cells, and fields that masks and positions read:

    grid         which grid a cell is of, from 1; 0 for text: the order of grids means nothing
    ring         of a cell, 0 on the border of its grid and one more with each step inwards; 0 for text
    row, column  of a cell, from 0; 0 for text
    question     1 for a question's tokens

and for cells continuous inputs, the concatenated one-hot vectors of shape, colour, row and column (zeros for the first
two where a cell is empty): as of an image's encoder, they say where the cell is, which no position needs to.

Source: the grid is gCOG's (Yang et al., arXiv 2401.15030, section 3) with cells as percepts; the layouts are those that
designs of multimodal masks are made for (Wang et al., AKI, arXiv 2503.02597; Xing et al., CCA, arXiv 2410.15926).
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from typing import Literal

import chz
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.gcog import COLOUR_NAMES, COLOURS, SHAPES
from recollect.data.synthetics.orders import shuffled
from recollect.data.synthetics.task import Slice, SyntheticTask

TEXT, PERCEPT = 0, 2
"""Types of tokens, numbered as in pallas_kernels/masks.py."""
KINDS = ("colour", "shape", "count")
_BLANK, _FIRST_KIND, _FIRST_SHAPE = 0, 1, 4
_WIDTH = 3


@chz.chz(typecheck=True)
class GridSlice(Slice):
    """Examples of `grids` grids with `objects` objects each, `filler` tokens from the questions."""

    grids: int = chz.field(validator=at_least(1))
    objects: int = chz.field(validator=at_least(1))
    filler: int = chz.field(validator=at_least(0))


@chz.chz(typecheck=True)
class GridQuestions(SyntheticTask):
    """Questions about grids of coloured shapes.

    Attributes:
      side: rows and columns of a grid.
      grids, objects: how many grids, and objects in each of them.
      shapes, colours: how many there are.
      questions: questions of an example; each is of one of `kinds` at random.
      kinds: some of colour, shape and count.
      filler: words of text between grids and questions.
      words: different words of filler.
      order: whether the grids or the questions come first.
    """

    side: int = chz.field(default=6, validator=at_least(1))
    grids: int = 1
    objects: int = 9
    shapes: int = chz.field(default=16, validator=at_least(2))
    colours: int = chz.field(default=4, validator=at_least(2))
    questions: int = chz.field(default=8, validator=at_least(1))
    kinds: tuple[str, ...] = KINDS
    filler: int = 0
    words: int = chz.field(default=16, validator=at_least(1))
    order: Literal["grids_first", "questions_first"] = "grids_first"
    extrapolation: tuple[int, ...] = ()

    breakdown = "question"

    @property
    def _first_colour(self) -> int:
        return _FIRST_SHAPE + self.shapes

    @property
    def _first_row(self) -> int:
        return self._first_colour + self.colours

    @property
    def _first_count(self) -> int:
        return self._first_row + 2 * self.side

    @property
    def _first_number(self) -> int:
        return self._first_count + self.shapes + 1  # no shape is there twice, so counts end with the shapes

    @property
    def _first_word(self) -> int:
        return self._first_number + self.questions

    @property
    def _first_cell(self) -> int:
        return self._first_word + self.words

    @property
    def vocabulary(self) -> int:
        return self._first_cell + 1 + self.shapes * self.colours

    def slice(self) -> GridSlice:
        return self.sized(self.grids, self.objects, self.filler)

    def sized(self, grids: int, objects: int, filler: int) -> GridSlice:
        """Returns the slice of examples of some grids, objects in each and words of filler."""
        asked = self.questions * (_WIDTH if self.order == "grids_first" else _WIDTH + 2)
        length = grids * self.side**2 + filler + asked
        return GridSlice(length=length, grids=grids, objects=objects, filler=filler)

    def scaled(self, slice: GridSlice, factor: int) -> GridSlice:
        """Returns the slice with so much filler between grids and questions that it is `factor` times as long."""
        filler = slice.filler + (factor - 1) * slice.length
        return chz.replace(self.sized(slice.grids, slice.objects, filler), weight=slice.weight)

    def check(self, slice: GridSlice) -> None:
        for name, most in (("shapes", SHAPES), ("colours", COLOURS)):
            if getattr(self, name) > most:
                raise UserError(f"{name}={getattr(self, name)}: there are {most}")
        if not self.kinds or not set(self.kinds) <= set(KINDS) or len(set(self.kinds)) < len(self.kinds):
            raise UserError(f"kinds={self.kinds}: must be some of {', '.join(KINDS)}, each once")
        if "shape" in self.kinds and slice.grids > 1:
            raise UserError(f"kinds={self.kinds}: shape is asked of one grid, not of grids={slice.grids}")
        if slice.objects > self.side**2:
            raise UserError(f"objects={slice.objects}: a grid of {self.side} x {self.side} has {self.side**2} cells")
        if slice.grids * slice.objects > self.shapes:
            most = self.shapes // slice.grids
            raise UserError(f"objects={slice.objects}: no shape appears twice, so shapes={self.shapes} allow {most}")
        if slice.length != (length := self.sized(slice.grids, slice.objects, slice.filler).length):
            raise UserError(f"length={slice.length}: these grids, words and questions take {length} tokens")

    def chance(self, slice: GridSlice) -> float:
        """Returns the share right of the best guess that knows the question and how many objects there are."""
        count, share = slice.grids * slice.objects, 1 / self.colours
        counts = (math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(count + 1))
        guesses = {"colour": share, "shape": 1 / self.shapes, "count": max(counts)}
        return sum(guesses[kind] for kind in self.kinds) / len(self.kinds)

    def group_names(self, slice: GridSlice) -> tuple[str, ...]:
        return KINDS

    def spelling(self, token: int) -> str:
        letters, colours = string.ascii_lowercase[: self.shapes], COLOUR_NAMES[: self.colours]
        names = [".", *(f"{kind.upper()}?" for kind in KINDS), *letters, *colours]
        names += [f"{axis}{place}" for axis in ("row", "col") for place in range(self.side)]
        names += [*map(str, range(self.shapes + 1)), *(f"#{number}" for number in range(self.questions))]
        names += [*(f"w{word}" for word in range(self.words)), "[ ]"]
        return [*names, *(f"[{letter}.{colour}]" for letter in letters for colour in colours)][token]

    def sample(self, key: Key[Array, ""], slice: GridSlice, batch_size: int) -> Batch:
        """Returns a batch with one target per question and the fields of the module's docstring."""
        b, cells, n = batch_size, self.side**2, slice.grids * slice.objects
        of_shapes, of_colours, of_cells, of_questions, of_filler = jax.random.split(key, 5)
        shapes = shuffled(of_shapes, b, self.shapes)[:, :n]
        colours = jax.random.randint(of_colours, (b, n), 0, self.colours)
        places = shuffled(of_cells, b * slice.grids, cells)[:, : slice.objects].reshape(b, slice.grids, -1)
        at = (places + cells * jnp.arange(slice.grids)[:, None]).reshape(b, n)
        objects = self._first_cell + 1 + shapes * self.colours + colours
        grid = jnp.full((b, slice.grids * cells), self._first_cell, jnp.int32)
        grid = grid.at[jnp.arange(b)[:, None], at].set(objects, unique_indices=True)

        questions, answers, kinds = self._asked(of_questions, shapes, colours, at)
        words = jax.random.randint(of_filler, (b, slice.filler), self._first_word, self._first_cell)
        numbers = jnp.broadcast_to(self._first_number + jnp.arange(self.questions), answers.shape)
        if self.order == "questions_first":
            questions = jnp.concatenate([numbers[:, :, None], questions], axis=2)
        questions = questions.reshape(b, -1)
        if self.order == "grids_first":
            parts = {"grids": grid, "words": words, "questions": questions}
            first, step = slice.length - questions.shape[1] + _WIDTH - 1, _WIDTH
        else:
            parts = {"questions": questions, "words": words, "grids": grid, "numbers": numbers}
            first, step = slice.length - self.questions, 1
        positions = first + step * jnp.arange(self.questions, dtype=jnp.int32)
        fields = self._fields({name: part.shape[1] for name, part in parts.items()})
        types = jnp.where(fields["grid"] > 0, PERCEPT, TEXT)
        tokens = jnp.concatenate(list(parts.values()), axis=1).astype(jnp.int32)
        return Batch(
            tokens,
            answers,
            jnp.broadcast_to(positions, answers.shape),
            jnp.ones(answers.shape, jnp.float32),
            groups=kinds,
            token_types=jnp.broadcast_to(types, tokens.shape),
            fields={name: jnp.broadcast_to(field, tokens.shape) for name, field in fields.items()},
            vectors=self._vectors(tokens, fields),
        )

    def _asked(
        self, key: Key[Array, ""], shapes: Int[Array, "b n"], colours: Int[Array, "b n"], at: Int[Array, "b n"]
    ) -> tuple[Int[Array, "b q 3"], Int[Array, "b q"], Int[Array, "b q"]]:
        """Returns questions, their answers and kinds (numbers of KINDS), from the objects' shapes, colours, cells."""
        of_kinds, of_objects, of_colours = jax.random.split(key, 3)
        shape = (shapes.shape[0], self.questions)
        numbers = jnp.asarray([KINDS.index(kind) for kind in self.kinds], jnp.int32)
        kinds = numbers[jax.random.randint(of_kinds, shape, 0, len(self.kinds))]
        which = jax.random.randint(of_objects, shape, 0, shapes.shape[1])
        of_one = [jnp.take_along_axis(values, which, axis=1) for values in (shapes, colours, at)]
        letter, colour, place = _FIRST_SHAPE + of_one[0], self._first_colour + of_one[1], of_one[2]
        counted = jax.random.randint(of_colours, shape, 0, self.colours)
        count = self._first_count + jnp.sum(colours[:, None, :] == counted[:, :, None], axis=2)
        row, column = self._first_row + place // self.side, self._first_row + self.side + place % self.side
        first = jnp.stack([jnp.full_like(row, _BLANK), row, jnp.full_like(row, _BLANK)])
        second = jnp.stack([letter, column, self._first_colour + counted])
        answers = jnp.stack([colour, letter, count])
        first, second, answers = (jnp.take_along_axis(x, kinds[None], axis=0)[0] for x in (first, second, answers))
        return jnp.stack([_FIRST_KIND + kinds, first, second], axis=2), answers.astype(jnp.int32), kinds

    def _fields(self, lengths: Mapping[str, int]) -> dict[str, Int[Array, " t"]]:
        """Returns the tokens' fields, from the lengths of the parts of an example, in order."""
        part = np.repeat(list(lengths), list(lengths.values()))
        is_cell = part == "grids"
        number = np.cumsum(is_cell) - 1
        row, column = number // self.side % self.side, number % self.side
        ring = np.minimum(np.minimum(row, self.side - 1 - row), np.minimum(column, self.side - 1 - column))
        of_cells = {"grid": 1 + number // self.side**2, "ring": ring, "row": row, "column": column}
        fields = {name: np.where(is_cell, field, 0) for name, field in of_cells.items()}
        fields["question"] = part == "questions"
        return {name: jnp.asarray(field, jnp.int32) for name, field in fields.items()}

    def _vectors(self, tokens: Int[Array, "b t"], fields: Mapping[str, Int[Array, " t"]]) -> Float[Array, "b t e"]:
        """Returns the cells' one-hot vectors, zeros for text; e = shapes + colours + 2 side."""
        is_cell, item = fields["grid"] > 0, tokens - self._first_cell - 1
        shape = jnp.where(item >= 0, item // self.colours, -1)  # -1 has no one in its vector
        colour = jnp.where(item >= 0, item % self.colours, -1)
        row, column = (
            jnp.broadcast_to(jnp.where(is_cell, fields[axis], -1), tokens.shape) for axis in ("row", "column")
        )
        sizes = ((shape, self.shapes), (colour, self.colours), (row, self.side), (column, self.side))
        return jnp.concatenate([jax.nn.one_hot(number, size) for number, size in sizes], axis=2)
