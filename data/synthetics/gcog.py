"""gCOG in token form: a rule of several operators on a grid of coloured letters.

    tokens   IF exist k red . . | DO getcolor m . . . | DO go a blue . . | . . m green . . k red ... ?
    label                                                               the answer, at the last token

A rule is a list of operators: if the first is true, do the second, else go on with the third, and so on; a rule of one
is an operator alone. Of an operator and its one or two objects (letter and colour) `exist` says whether the object is
there; `getcolor` and `getshape` give the other half of a unique object; `go` gives its cell; `sumeven`, `sumodd`,
`producteven`, `productodd` say whether the sum or product of the objects' coordinates (from 0) has that parity. A grid
cell is two tokens, letter and colour, or two blanks.

Answers are balanced: `exist` is true half the time, and so are parities, for which objects are placed on odd
coordinates often enough. Distractors never make an answer ambiguous: they share no letter that is asked for its colour,
no colour that is asked for its letter, and are none of the rule's objects.

Source: Yang et al., On the generalization capacity of neural networks during generic multimodal reasoning (arXiv
2401.15030); IBM/gcog. Trees there branch on both sides; here the else side alone goes on, and objects of a rule have
different letters.
"""

from __future__ import annotations

import string
from typing import Literal

import chz
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.answers import answered
from recollect.data.synthetics.orders import shuffled
from recollect.data.synthetics.task import Slice, SyntheticTask

OPERATORS = ("exist", "sumeven", "sumodd", "producteven", "productodd", "getcolor", "getshape", "go")
"""Those with a truth value, which may be conditions, come first."""
COLOUR_NAMES = ("red", "green", "blue", "yellow", "black", "white", "pink", "brown", "gray", "cyan")
SHAPES, COLOURS = 26, len(COLOUR_NAMES)
_CONDITIONS = 5
_EXIST, _PRODUCT_EVEN, _COLOUR, _SHAPE, _GO = 0, 3, 5, 6, 7
_BLANK, _IF, _DO, _ASK, _FIRST = 0, 1, 2, 3, 4
_FALSE = _FIRST + len(OPERATORS)
_ROW = 6


@chz.chz(typecheck=True)
class GCOGSlice(Slice):
    """Examples of `operators` operators with `fewest` to `distractors` distractors (`GCOG.sized`)."""

    operators: int = chz.field(validator=at_least(1))
    distractors: int = chz.field(validator=at_least(0))
    fewest: int = chz.field(validator=at_least(0))


@chz.chz(typecheck=True)
class GCOG(SyntheticTask):
    """Compositional reasoning on a grid.

    Attributes:
      operators: operators of a rule, odd: the depth of gCOG's trees.
      distractors, fewest: most and fewest objects beside the rule's, uniformly drawn between them.
      side: rows and columns of the grid.
      order: whether the rule comes before the grid or after it.
    """

    operators: int = 1
    distractors: int = 5
    fewest: int = 1
    side: int = 10
    order: Literal["rule_first", "grid_first"] = "rule_first"

    breakdown = "operator"

    @property
    def vocabulary(self) -> int:
        return self._first_cell + self.side**2 + SHAPES + COLOURS

    @property
    def _first_cell(self) -> int:
        return _FALSE + 2

    def slice(self) -> GCOGSlice:
        return self.sized(self.operators, self.distractors, self.fewest)

    def sized(self, operators: int, distractors: int, fewest: int) -> GCOGSlice:
        """Returns the slice of rules of some operators, and grids of `fewest` to `distractors` distractors."""
        length = _ROW * operators + 2 * self.side**2 + 1
        return GCOGSlice(length=length, operators=operators, distractors=distractors, fewest=fewest)

    def scaled(self, slice: GCOGSlice, factor: int) -> GCOGSlice:
        """Returns the slice of exactly `factor` times as many distractors."""
        more = factor * slice.distractors
        return chz.replace(self.sized(slice.operators, more, more), weight=slice.weight)

    def check(self, slice: GCOGSlice) -> None:
        if slice.operators % 2 == 0 or slice.operators > 7:
            raise UserError(f"operators={slice.operators}: must be 1, 3, 5 or 7")
        if slice.fewest > slice.distractors:
            raise UserError(f"fewest={slice.fewest}: must be at most distractors={slice.distractors}")
        if slice.length != (length := self.sized(slice.operators, 0, 0).length):
            raise UserError(f"length={slice.length}: this rule and grid take {length} tokens")
        rule = 2 * slice.operators
        # Each operator may forbid distractors a letter and a colour, and no two of them are alike.
        kinds = (SHAPES - slice.operators) * (COLOURS - slice.operators) - rule
        most = min(self.side**2 - 2 * rule, kinds)
        if slice.distractors > most or self.side // 2 * (self.side // 2) < rule:
            fit = f"at most {most} fit a grid of {self.side} x {self.side}" if most >= 0 else "take a larger side"
            raise UserError(
                f"distractors={slice.distractors}, side={self.side}: {fit} with {slice.operators} operators"
            )

    def chance(self, slice: GCOGSlice) -> float:
        """Returns the share right of a guess that knows which operator answers."""
        return (_CONDITIONS / 2 + 1 / COLOURS + 1 / SHAPES + 1 / self.side**2) / len(OPERATORS)

    def group_names(self, slice: GCOGSlice) -> tuple[str, ...]:
        return OPERATORS

    def spelling(self, token: int) -> str:
        letters = string.ascii_lowercase
        names = [".", "IF", "DO", "ASK", *OPERATORS, "false", "true", *(f"{cell}" for cell in range(self.side**2))]
        return [*names, *letters, *COLOUR_NAMES][token]

    def sample(self, key: Key[Array, ""], slice: GCOGSlice, batch_size: int) -> Batch:
        """Returns a batch with one target per row."""
        b, rows = batch_size, slice.operators
        of_operators, of_pairs, of_presence, of_objects, of_cells, of_counts = jax.random.split(key, 6)
        is_condition = np.arange(rows) % 2 == (0 if rows > 1 else 1)
        is_condition[-1] = False
        limits = jnp.asarray(np.where(is_condition, _CONDITIONS, len(OPERATORS)), jnp.int32)
        operator = jax.random.randint(of_operators, (b, rows), 0, limits)
        is_parity = (operator > _EXIST) & (operator < _COLOUR)
        twice = is_parity & jax.random.bernoulli(of_pairs, shape=(b, rows))
        used = jnp.stack([jnp.ones_like(twice), twice], axis=2)

        shapes, colours, others = _objects(of_objects, operator, slice.distractors)
        there = jax.random.bernoulli(of_presence, shape=(b, rows))
        present = used & ((operator != _EXIST) | there)[:, :, None]
        cells = _cells(of_cells, operator, used, self.side, slice.distractors)
        of_rule = cells[:, : 2 * rows].reshape(b, rows, 2)
        count = jax.random.randint(of_counts, (b, 1), slice.fewest, slice.distractors + 1)
        kept = jnp.concatenate([present.reshape(b, -1), jnp.arange(slice.distractors) < count], axis=1)
        pairs = jnp.concatenate([(shapes * COLOURS + colours).reshape(b, -1), others], axis=1)
        grid = jnp.full((b, self.side**2 + 1), -1, jnp.int32)
        grid = grid.at[jnp.arange(b)[:, None], jnp.where(kept, cells, self.side**2)].set(pairs)[:, :-1]

        first = self._first_cell + self.side**2
        shape, colour = first + shapes, first + SHAPES + colours
        named_shape = jnp.where(used & (operator != _SHAPE)[:, :, None], shape, _BLANK)
        named_colour = jnp.where(used & (operator != _COLOUR)[:, :, None], colour, _BLANK)
        mark = jnp.broadcast_to(jnp.where(is_condition, _IF, _DO), (b, rows))
        named = jnp.stack([named_shape, named_colour], axis=3).reshape(b, rows, 4)
        rule = jnp.concatenate([jnp.stack([mark, _FIRST + operator], axis=2), named], axis=2).reshape(b, -1)
        halves = jnp.stack([first + grid // COLOURS, first + SHAPES + grid % COLOURS], axis=2)
        picture = jnp.where((grid >= 0)[:, :, None], halves, _BLANK).reshape(b, -1)

        truth = jnp.where(operator == _EXIST, present[:, :, 0], _parities(operator, of_rule, used, self.side))
        kinds = jnp.stack(
            [_FALSE + truth, colour[:, :, 0], shape[:, :, 0], self._first_cell + of_rule[:, :, 0]], axis=2
        )
        said = jnp.take_along_axis(kinds, jnp.maximum(operator - _CONDITIONS + 1, 0)[:, :, None], axis=2)[:, :, 0]
        # The operator behind the first condition that is true answers; the last one where none is.
        stops = jnp.concatenate([truth[:, 0:-1:2], jnp.ones((b, 1), bool)], axis=1)
        answers = jnp.minimum(2 * jnp.argmax(stops, axis=1) + 1, rows - 1)[:, None]
        ask = jnp.full((b, 1), _ASK, jnp.int32)
        parts = [rule, picture] if self.order == "rule_first" else [picture, rule]
        group = jnp.take_along_axis(operator, answers, axis=1)
        return answered(
            jnp.concatenate([*parts, ask], axis=1), jnp.take_along_axis(said, answers, axis=1), groups=group
        )


def _objects(
    key: Key[Array, ""], operator: Int[Array, "b r"], distractors: int
) -> tuple[Int[Array, "b r 2"], Int[Array, "b r 2"], Int[Array, "b d"]]:
    """Returns letters and colours of the rule's objects, and distractors as numbers letter * COLOURS + colour."""
    b, rows = operator.shape
    of_shapes, of_colours, of_choices, of_others = jax.random.split(key, 4)
    shapes = shuffled(of_shapes, b, SHAPES)[:, : 2 * rows].reshape(b, rows, 2)
    palette = shuffled(of_colours, b, COLOURS)
    # Colour number `row` of the palette belongs to that row's object if its letter is asked, and to nothing else.
    choices = jax.random.randint(of_choices, (b, 2 * rows), rows, COLOURS)
    common = jnp.take_along_axis(palette, choices, axis=1).reshape(b, rows, 2)
    colours = jnp.where((operator == _SHAPE)[:, :, None], palette[:, :rows, None], common)

    pair = jnp.arange(SHAPES * COLOURS)
    letter_asked = (operator == _COLOUR)[:, :, None] & (shapes[:, :, :1] == pair // COLOURS)
    colour_asked = (operator == _SHAPE)[:, :, None] & (colours[:, :, :1] == pair % COLOURS)
    named = (shapes * COLOURS + colours).reshape(b, -1, 1) == pair
    forbidden = jnp.any(letter_asked | colour_asked, axis=1) | jnp.any(named, axis=1)
    return shapes, colours, shuffled(of_others, b, SHAPES * COLOURS, forbidden)[:, :distractors]


def _cells(
    key: Key[Array, ""], operator: Int[Array, "b r"], used: Bool[Array, "b r 2"], side: int, distractors: int
) -> Int[Array, "b n"]:
    """Returns a different cell for each object: two per operator, then the distractors."""
    b, rows = operator.shape
    of_odd, of_free, of_rows = jax.random.split(key, 3)
    cells = np.arange(side**2)
    odd = cells[(cells // side % 2 == 1) & (cells % side % 2 == 1)]
    share = (len(odd) / len(cells)) ** np.array([1.0, 2.0])  # of products that are odd by themselves, of 1 or 2 objects
    forced = jnp.asarray((0.5 - share) / (1 - share), jnp.float32)[used[:, :, 1].astype(int)]
    forced = forced * ((operator >= _PRODUCT_EVEN) & (operator < _COLOUR))
    forced = jax.random.uniform(of_rows, (b, rows)) < forced
    forced = jnp.repeat(forced, 2, axis=1)
    on_odd = jnp.asarray(odd)[shuffled(of_odd, b, len(odd))[:, : 2 * rows]]
    taken = jnp.any((on_odd[:, :, None] == jnp.asarray(cells)) & forced[:, :, None], axis=1)
    free = shuffled(of_free, b, side**2, taken)[:, : 2 * rows + distractors]
    return jnp.concatenate([jnp.where(forced, on_odd, free[:, : 2 * rows]), free[:, 2 * rows :]], axis=1)


def _parities(
    operator: Int[Array, "b r"], cells: Int[Array, "b r 2"], used: Bool[Array, "b r 2"], side: int
) -> Bool[Array, "b r"]:
    """Returns whether what each operator says of the parity of its objects' coordinates is true."""
    row, column = cells // side % 2 == 1, cells % side % 2 == 1
    is_sum_odd = jnp.sum((row ^ column) & used, axis=2) % 2 == 1
    is_product_odd = jnp.all((row & column) | ~used, axis=2)
    is_odd = jnp.where(operator >= _PRODUCT_EVEN, is_product_odd, is_sum_odd)
    asks_odd = (operator == 2) | (operator == 4)
    return is_odd == asks_odd
