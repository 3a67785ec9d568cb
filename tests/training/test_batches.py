"""How text reaches the step: by batch number whatever was restarted, over any mesh, and no more programs than row
lengths."""

import json

import jax
import numpy as np
import pytest

from recollect.configuration import UserError, to_json
from recollect.data.text.dataset import Text
from recollect.data.text.rows import Chunked, Decomposed, Packed
from recollect.layers import Attention
from recollect.layers.modules.positions import Rotary
from recollect.models import LanguageModel, repeat
from recollect.training.batches import open_batches
from recollect.training.evaluator import evaluate
from recollect.training.experiment import Experiment, Mesh, Run
from recollect.training.host_batches import local_rows, place_batches
from recollect.training.optimizer import AdamW
from recollect.training.sharding import make_mesh
from recollect.training.step import member_values, program_for
from tests.training.distributed.feeding_together import few_steps
from tests.training.distributed.processes import Together
from tests.training.tiny import tiny


@pytest.fixture(autouse=True)
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(40):
        (folder / f"{index}.txt").write_bytes(
            random.integers(97, 123, int(random.integers(1, 400)), np.uint8).tobytes()
        )
    return folder


def experiment(corpus, sequences, mesh=None, **run):
    return Experiment(
        name="tiny text",
        model=LanguageModel(width=16, stages=repeat(Attention(heads=2, positions=Rotary()), depth=1), mlp=None),
        data=Text(source=str(corpus), length=32, sequences=sequences, held_out_bytes=256),
        optimizer=AdamW(learning_rate=1e-3),
        run=Run(steps=40, batch_size=8, steps_per_call=4, mesh=mesh or Mesh(), **run),
    )


class Recorder:
    """Stands for a program: keeps the batches that it is given."""

    def __init__(self, mesh=None):
        self.mesh, self.population, self.seen = mesh, None, []

    def jit(self, key, function, **options):
        def train_on(state, values, batches):
            self.seen.append(batches)
            return state, {}

        return train_on


@pytest.mark.parametrize(
    "sequences", [Packed(), Chunked(document_mask=False), Decomposed(shortest=8, cycles=2)], ids=repr
)
def test_a_step_gets_its_batch_after_any_restart_and_skip(corpus, sequences):
    one = experiment(corpus, sequences)
    wanted = one.data.batches(0, 8)

    def check(feed, program, step, length, offset):
        feed.train(None, None, length, step)
        for place in range(length):
            number = step + place + offset
            expected = wanted.read(number, 0, wanted.rows(number))
            for name in ("tokens", "targets", "weights", "segments"):
                found = getattr(program.seen[-1], name)
                assert (found is None) == (getattr(expected, name) is None)
                if found is not None:
                    np.testing.assert_array_equal(found[place], getattr(expected, name))

    program = Recorder()
    feed = open_batches(one, program, None)
    step = 0
    while step < 12:
        length = feed.steps_ahead(step, min(5, 12 - step))
        assert length == (1 if isinstance(sequences, Decomposed) else min(4, 12 - step))
        check(feed, program, step, length, 0)
        step += length
    feed.skip(7)
    check(feed, program, 12, 1, 7)
    state = json.loads(json.dumps(feed.state()))
    assert state == {"corpus": one.data.prepared().digest, "offset": 7} and feed.waited > 0
    again = open_batches(one, program, state)
    check(again, program, 13, 1, 7)
    check(again, program, 3, 1, 7)  # rolled back
    with pytest.raises(UserError, match="was trained on corpus 000000000000"):
        open_batches(one, program, {**state, "corpus": "0" * 64})
    with pytest.raises(UserError, match="ordered batches otherwise"):
        open_batches(one, program, {"corpus": state["corpus"], "grain": {}})


@pytest.mark.parametrize("sequences", [Packed(), Decomposed(shortest=8)], ids=repr)
def test_devices_hold_the_rows_of_the_whole_batch(corpus, sequences):
    batches = experiment(corpus, sequences).data.batches(0, 8)
    mesh = make_mesh(Mesh(data=2, fsdp=2, sequence=2))
    for first in range(0, 8, 2):
        numbers = [first, first + 1] if isinstance(sequences, Packed) else [first]
        rows, length = batches.rows(first), batches.row_length(first)
        ranges = local_rows(rows, length, mesh)
        assert ranges == [(part * rows // 4, (part + 1) * rows // 4) for part in range(4)]
        pieces = [{(begin, end): batches.read(number, begin, end) for begin, end in ranges} for number in numbers]
        placed = place_batches(pieces, rows, length, mesh)
        for place, number in enumerate(numbers):
            whole = batches.read(number, 0, rows)
            np.testing.assert_array_equal(placed.tokens[place], whole.tokens)
            np.testing.assert_array_equal(placed.weights[place], whole.weights)
        assert {shard.data.shape[1] for shard in placed.tokens.addressable_shards} == {rows // 4}
    assert local_rows(6, 8, None) == [(0, 6)]


def test_decomposition_trains_with_one_program_a_length_and_evaluates_on_packed_rows(corpus):
    one = experiment(corpus, Decomposed(shortest=8, cycles=3))
    program = program_for(one)
    feed = open_batches(one, program, None)
    state = program.init(0)
    values = member_values([one], False)
    compiled = []
    lengths = []
    for step in range(feed.batches._schedule.before(2)[0] + 14):
        lengths.append(feed.batches.row_length(step))
        state, metrics = feed.train(state, values, feed.steps_ahead(step, 4), step)
        compiled.append(program._compiled["train_on"]._cache_size())
    assert set(lengths) == {8, 16, 32} and compiled[-1] == 3
    assert compiled == [len(set(lengths[: step + 1])) for step in range(len(lengths))]
    assert np.isfinite(np.asarray(metrics["loss"])).all()
    found = evaluate(program, state["params"], 0, final=True)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / np.log(2))
    facts = feed.result_entries()
    assert facts["rows"]["rows_by_length"].keys() == {"8", "16", "32"} and 0 < facts["rows"]["retained_share"] < 1
    assert json.loads(json.dumps(facts)) == facts


def test_what_cannot_be_is_refused(corpus, tmp_path):
    feed = open_batches(experiment(corpus, Decomposed(shortest=2), Mesh(sequence=4)), Recorder(), None)
    with pytest.raises(UserError, match=r"run\.mesh\.sequence=4: does not divide rows of 2 tokens"):
        feed.steps_ahead(0, 1)
    recall = open_batches(tiny(tmp_path), Recorder(), None)
    assert recall.steps_ahead(0, 100) == 10 and recall.waited == 0
    assert jax.tree.leaves(recall.state()) == []


@pytest.mark.parametrize(
    "sequences", [Packed(), pytest.param(Decomposed(shortest=8), marks=pytest.mark.slow)], ids=repr
)
def test_two_processes_read_a_half_each_and_train_as_one_does(corpus, tmp_path, sequences):
    expected = few_steps(experiment(corpus, sequences))
    one = experiment(corpus, sequences, Mesh(data=2))
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(to_json(one)))
    with Together(tmp_path, ["-m", "tests.training.distributed.feeding_together", str(path)]) as run:
        assert run.codes() == {0: 0, 1: 0}, run.output(0)[-2000:]
        found = [json.loads(run.output(index).rpartition("found ")[2].splitlines()[0]) for index in (0, 1)]
    half = expected["rows"][0][1] // 2
    assert [part["rows"] for part in found] == [[[0, half]], [[half, 2 * half]]]
    for part in found:
        np.testing.assert_allclose(part["losses"], expected["losses"], rtol=1e-5)
        assert part["bits"] == pytest.approx(expected["bits"], rel=1e-5) and part["sample"] == found[0]["sample"]
