"""Fields and inputs of grids and questions: written out cell by cell from the tokens."""

import dataclasses

import jax
import numpy as np
import pytest

from recollect.data.synthetics import GridQuestions

TASKS = {
    "grid": GridQuestions(side=5, filler=3),
    "grids": GridQuestions(side=2, grids=3, objects=3, kinds=("colour",), questions=2, order="questions_first"),
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_fields_and_vectors_say_what_each_token_is(task):
    batch = jax.device_get(jax.jit(lambda: task.train_batch(0, 0, batch_size=2))())
    assert {name: field.shape for name, field in batch.fields.items()} == dict.fromkeys(
        ("grid", "ring", "row", "column", "question"), batch.tokens.shape
    )
    for example in range(2):
        row = jax.tree.map(lambda x, at=example: x[at], dataclasses.asdict(batch))
        words = [task.spelling(int(token)) for token in row["tokens"]]
        kinds = [place for place, word in enumerate(words) if word.endswith("?")]
        asked = {place + step for place in kinds for step in range(-words[place - 1].startswith("#"), 3)}
        seen = 0
        for place, word in enumerate(words):
            fields = {name: int(field[place]) for name, field in row["fields"].items()}
            ones = np.flatnonzero(row["vectors"][place]).tolist()
            if not word.startswith("["):
                assert fields == {"grid": 0, "ring": 0, "row": 0, "column": 0, "question": int(place in asked)}
                assert row["token_types"][place] == 0 and ones == []
                continue
            grid, cell = divmod(seen, task.side**2)
            r, c = divmod(cell, task.side)
            ring = min(r, c, task.side - 1 - r, task.side - 1 - c)
            assert fields == {"grid": grid + 1, "ring": ring, "row": r, "column": c, "question": 0}
            assert row["token_types"][place] == 2
            first = task.shapes + task.colours
            of_object = [] if word == "[ ]" else word[1:-1].split(".")
            expected = [ord(of_object[0]) - ord("a")] if of_object else []
            expected += [task.shapes + ["red", "green", "blue", "yellow"].index(of_object[1])] if of_object else []
            assert ones == [*expected, first + r, first + task.side + c]
            seen += 1
        assert seen == task.grids * task.side**2


def test_no_guess_by_kind_beats_chance():
    task = TASKS["grid"]
    batch = jax.device_get(jax.jit(lambda: task.train_batch(1, 0, batch_size=2000))())
    best = 0
    for kind in range(3):
        counts = np.bincount(batch.targets[batch.groups == kind])
        best += counts.max()
    # 16,000 answers: their largest counts exceed the expected ones by little.
    assert best / batch.targets.size == pytest.approx(task.chance(task.slice()), abs=0.02)
