"""The benchmark's arithmetic, its talk with Zoology's process, and that its pieces do the work they are timed for."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.benchmarks import peer_side, recall_breakdown, recall_training, reporting, timing, zoology_runner
from recollect.configuration import UserError
from recollect.data.synthetics import MQAR
from recollect.layers.mixers.linear_attention import LinearAttention
from recollect.models import LanguageModel, repeat
from recollect.training.experiment import Experiment, Run
from recollect.training.step import Program


def turn(ours, step, data, others=0.0):
    return {"ours": {"step": ours}, "zoology": {"step": step, "data": data}, "others": others}


def test_ratios_compare_turns_that_follow_each_other():
    # The machine slows tenfold in the middle turn: the medians' ratio would be 0.04 / 0.02, each turn's own is 3 with
    # data.
    row = recall_training.summarise([turn(0.01, 0.02, 0.01), turn(0.2, 0.4, 0.2), turn(0.02, 0.04, 0.02)])
    assert row["ratio_with_data"] == pytest.approx(3.0)
    assert row["ratio_without_data"] == pytest.approx(2.0)
    assert row["ours_ms"] == pytest.approx(20.0)
    assert row["ours_rate"] == pytest.approx(64 / 0.02)
    assert row["zoology_with_data_ms"] == pytest.approx(60.0)
    assert row["zoology_data_ms"] == pytest.approx(20.0)


def test_turns_with_other_load_are_left_out_while_enough_remain():
    quiet, loaded = turn(0.01, 0.02, 0.0), turn(0.01, 0.5, 0.0, others=1.5)
    row = recall_training.summarise([quiet, loaded, quiet, loaded, quiet, loaded, loaded])
    assert row["quotable"] and row["turns_used"] == 3 and len(row["turns"]) == 7
    assert row["ratio_without_data_range"] == pytest.approx([2.0, 2.0])
    row = recall_training.summarise([quiet, quiet, loaded])
    assert not row["quotable"] and row["turns_used"] == 3
    text = recall_training.table([{"case": "a", "vocabulary": 256, **row}])
    assert "NOT TO BE QUOTED" in text and "aim" not in text
    # A system that does not tell what others do is trusted.
    assert recall_training.summarise([turn(0.01, 0.02, 0.0, others=float("nan"))] * 3)["quotable"]


def test_alone_has_no_ratio_and_the_table_says_whether_the_aim_is_met():
    alone = recall_training.summarise([{"ours": {"step": 0.01}, "zoology": None, "others": 0.0}] * 3)
    assert not any(name.startswith(("ratio", "zoology")) for name in alone)
    assert "aim" not in recall_training.table([{"case": "a", "vocabulary": 256, **alone}])
    rows = [
        {"case": "a", "vocabulary": vocabulary, **recall_training.summarise([turn(0.01, 0.025, 0.005)] * 3)}
        for vocabulary in (256, 8192)
    ]
    text = recall_training.table(rows)
    assert "aim 2 times, data included: met" in text
    assert "aim 4 times, data included: missed" in text


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells what other programs do")
def test_other_load_sees_a_busy_child_unless_it_is_our_own():
    # The child says on its own clock how much processor time it got, so that a loaded machine changes nothing.
    spin = "import sys, time; print('on', flush=True)\nwhile time.process_time() < 600: pass"
    child = subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE, text=True)
    try:
        child.stdout.readline()
        foreign, own = timing.OtherLoad(), timing.OtherLoad((child.pid,))
        start, before = time.perf_counter(), timing._process_ticks(child.pid)
        time.sleep(0.5)
        with_child, without = foreign.cores(), own.cores()
        share = (timing._process_ticks(child.pid) - before) / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - start)
    finally:
        child.kill()
        child.wait()
    assert share > 0.05
    assert with_child - without == pytest.approx(share, abs=0.15)


def test_results_of_two_machines_lie_apart():
    here = {"cpu_model": "Intel(R) Xeon(R) Processor", "cores": 2}
    assert reporting.device_folder(here, "cpu", "cpu") == "cpu-intel-r-xeon-r-processor-2-cores"
    assert reporting.device_folder(here, "gpu", "NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_set_default_changes_one_default_and_knows_when_there_is_nothing_to_change():
    def build(size, padding=None, device="cuda", *, other=1):
        return size, padding, device, other

    assert zoology_runner.set_default(build, "device", "cpu")
    assert build(3) == (3, None, "cpu", 1)
    assert not zoology_runner.set_default(build, "device", "cpu")
    with pytest.raises(ValueError, match="no optional argument place"):
        zoology_runner.set_default(build, "place", "cpu")
    with pytest.raises(ValueError, match="no optional argument size"):
        zoology_runner.set_default(build, "size", 1)


def test_the_runner_answers_errors_and_goes_on_and_keeps_prints_out_of_its_replies(capsys):
    class Loud:
        def train(self, steps):
            print("not a reply")
            if steps < 0:
                raise ValueError("negative")
            return {"done": steps}

    requests = [json.dumps({"op": "train", "steps": steps}) for steps in (-1, 2)]
    peer_side.serve(functools.partial(zoology_runner.answer, Loud), requests)
    replies = capsys.readouterr().out.splitlines()
    assert [json.loads(line.removeprefix("RESULT ")) for line in replies] == [
        {"error": "ValueError: negative"},
        {"done": 2},
    ]


def test_step_clock_notes_a_time_a_step_and_the_loss():
    clock = zoology_runner.StepClock()
    clock.log({"train/loss": 2.0, "epoch": 0})
    clock.log({"train/loss": 1.5, "epoch": 0})
    assert len(clock.times) == 2 and clock.times[1] >= clock.times[0]
    assert clock.loss == 1.5


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "zoology").mkdir()
    (tmp_path / "zoology" / "train.py").write_text("")
    return str(tmp_path)


def interpreter(tmp_path: Path, answers: list[dict]) -> str:
    """A program in the place of Zoology's interpreter, which gives these answers in turn."""
    path = tmp_path / "interpreter"
    lines = [
        f"#!{sys.executable}",
        "import json, sys",
        f"answers = {answers!r}",
        "for request, answer in zip(sys.stdin, answers):",
        "    print('RESULT ' + json.dumps({**answer, 'request': json.loads(request)}), flush=True)",
    ]
    path.write_text("\n".join(lines))
    path.chmod(0o755)
    return str(path)


def test_a_turn_of_zoology_gives_time_a_step_and_time_of_one_batch_of_data(tmp_path, checkout):
    steps = {"step_seconds": [9.0, 9.0, 0.5, 0.5, 0.7, 0.5], "data_seconds": 1.0, "examples": 6 * 64}
    long = {"step_seconds": [0.2, 0.3, 0.4], "data_seconds": 4.0, "examples": 8 * 64}
    peer = recall_training.Zoology(checkout, interpreter(tmp_path, [{"versions": {}}, {"parameters": 7}, steps, long]))
    assert peer.facts["commit"] is None
    peer.build({"mixer": "based"})
    assert peer.parameters == 7
    assert peer.step_seconds == pytest.approx(0.5)  # the two warm-up steps don't count
    assert peer.turn(4.0) == {"step": pytest.approx(0.3), "data": pytest.approx(0.5)}
    peer.peer.close()
    assert peer.peer.process.returncode == 0


def test_what_goes_wrong_with_zoology_is_said_in_one_line(tmp_path, checkout):
    with pytest.raises(UserError, match="is not a checkout of Zoology"):
        recall_training.Zoology(str(tmp_path / "zoology"), sys.executable)
    with pytest.raises(UserError, match=r"--zoology-python .*nowhere cannot be run: No such file"):
        recall_training.Zoology(checkout, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="Zoology cannot be run: ModuleNotFoundError: No module named 'torch'"):
        recall_training.Zoology(
            checkout, interpreter(tmp_path, [{"error": "ModuleNotFoundError: No module named 'torch'"}])
        )
    with pytest.raises(UserError, match="Zoology cannot be run: the process ended: exit code 0"):
        recall_training.Zoology(checkout, interpreter(tmp_path, []))


def test_options_that_do_not_fit_are_named():
    for arguments, message in ((["--rounds", "0"], "--rounds 0"), (["--dropout", "1"], r"--dropout 1.0: must be in")):
        with pytest.raises(UserError, match=message):
            recall_training.main(arguments)


@pytest.fixture(scope="module")
def program():
    experiment = Experiment(
        name="tiny",
        model=LanguageModel(width=8, stages=repeat(LinearAttention(feature_dim=4), depth=1), embedding_dropout=0.1),
        data=MQAR(vocab_size=32, length=8, pairs=2),
        run=Run(batch_size=3, steps_per_call=recall_breakdown.STEPS),
    )
    return Program(experiment)


def test_the_data_piece_makes_every_field_of_every_batch(program):
    part = program.experiment.data.train_slices()[0]
    make = jax.jit(lambda step: program.experiment.data.train_batch(jnp.uint32(0), step, part, 3))
    batches = [make(step) for step in range(recall_breakdown.STEPS)]
    expected = sum(float(np.sum(leaf)) for batch in batches for leaf in jax.tree.leaves(batch))
    assert float(recall_breakdown.data(program)()[0]) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_piece_takes_a_step_along_each_batch(program):
    # 20 steps of length 1e-6 from the same place: their sum is the gradients' sum at the start, but for second-order
    # terms.
    start = program.init(0)["params"]
    after, metrics = recall_breakdown.gradients(program, dropout=False)()
    assert metrics["loss"].shape == (recall_breakdown.STEPS,)
    assert len(np.unique(metrics["loss"])) == recall_breakdown.STEPS
    batches = recall_breakdown._batches(program)
    gradient = jax.jit(lambda batch: program.gradients(start, batch, None)[0]["embedding"])
    total = sum(
        np.asarray(gradient(jax.tree.map(lambda leaf, i=i: leaf[i], batches))) for i in range(recall_breakdown.STEPS)
    )
    moved = (
        np.asarray(start["embedding"], np.float64) - np.asarray(after["embedding"], np.float64)
    ) / recall_breakdown.TINY
    # A step of 1e-6 * gradient is rounded to the parameters' last bit, 2e-9 near 0.02: a few percent of the sum.
    assert np.sqrt(np.mean((moved - total) ** 2)) < 0.1 * np.sqrt(np.mean(total**2))


def test_the_optimizer_piece_updates_with_a_gradient_that_changes(program):
    (params, _), norms = recall_breakdown.optimizer(program)()
    start = jax.tree.leaves(program.init(0)["params"])
    tiny = recall_breakdown.TINY
    for step in (0, recall_breakdown.STEPS - 1):
        expected = np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64) * tiny + step * tiny)) for leaf in start))
        assert float(norms[step]) == pytest.approx(expected, rel=1e-5)
    assert all(
        np.all(np.asarray(new) != np.asarray(old)) for new, old in zip(jax.tree.leaves(params), start, strict=True)
    )


def test_differences_give_the_parts_and_the_table_names_the_largest(program, monkeypatch):
    def timed(pieces, seconds):
        assert seconds == 7.0
        return {name: recall_breakdown.STEPS * number / 1e3 for name, number in pieces.items()}

    def gradients(chosen, dropout):
        return 4.0 if chosen.experiment.data.vocab_size < 32 else 8.0 if dropout else 7.0

    monkeypatch.setattr(recall_breakdown, "time_in_turns", timed)
    monkeypatch.setattr(recall_breakdown, "gradients", gradients)
    for name, number in {"whole_step": 10.0, "data": 1.0, "embedding": 0.5, "optimizer": 0.75}.items():
        monkeypatch.setattr(recall_breakdown, name, lambda program, number=number: number)
    row = recall_breakdown.breakdown(program.experiment, 1.0)
    assert {name.strip(): value for name, value in row.items()} == pytest.approx(
        {
            "whole step": 10.0,
            "data": 1.0,
            "forward and backward": 8.0,
            "embedding lookup and gradient": 0.5,
            "dropout": 1.0,
            "layers": 3.5,
            "head and loss": 3.0,
            "optimizer": 0.75,
        }
    )
    assert "a: layers takes most" in recall_breakdown.breakdown_table({"a": row})


def test_pieces_take_turns_and_the_median_is_reported(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    order = []

    def piece(name, seconds):
        def call():
            order.append(name)
            clock[0] += seconds

        return call

    times = timing.time_in_turns({"a": piece("a", 1.0), "b": piece("b", 3.0)})
    assert order == ["a", "b"] * 6
    assert times == {"a": 1.0, "b": 3.0}
