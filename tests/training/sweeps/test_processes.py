"""Members in several processes: the results of those in turn; a member that fails and a process that is killed."""

import os
import signal

import chz
import pytest

from recollect.configuration import Preempted, UserError
from recollect.training.run_folder import read_result
from recollect.training.sweeps.study import run_study
from tests.training.tiny import tiny

SEEDS = tuple({"run.seed": seed} for seed in range(3))


def test_processes_give_the_results_of_members_in_turn_and_skip_what_is_done(tmp_path):
    experiment = tiny(tmp_path, steps=20)
    said: list[str] = []
    in_turn = run_study([experiment], SEEDS, tmp_path / "turn", log=lambda text: None)
    at_once = run_study([experiment], SEEDS, tmp_path / "once", at_once=2, log=said.append)
    assert [folder.name for folder in at_once] == [folder.name for folder in in_turn] == ["seed=0", "seed=1", "seed=2"]
    for one, other in zip(in_turn, at_once, strict=True):
        a, b = read_result(one), read_result(other)
        assert (
            (a["status"], a["steps"], a["seed"]) == (b["status"], b["steps"], b["seed"]) == ("finished", 20, a["seed"])
        )
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert "3 runs in 2 processes at once" in said and any(
        line.startswith("run 3 of 3 finished: tiny") for line in said
    )
    said.clear()
    run_study([experiment], SEEDS, tmp_path / "once", at_once=2, log=said.append)
    assert len([line for line in said if "already finished" in line]) == 3


def test_a_member_that_cannot_be_trained_ends_the_study_with_its_name(tmp_path):
    experiment = tiny(tmp_path)
    other = chz.replace(experiment, name="other")
    (tmp_path / "other/seed=0").mkdir(parents=True)
    (tmp_path / "other/seed=0/file").write_text("not a run")
    with pytest.raises(UserError, match=r"other/seed=0: .*not a run's folder"):
        run_study([experiment, other], SEEDS[:1], tmp_path, at_once=2, log=lambda text: None)


def test_sigterm_saves_what_is_in_training(tmp_path):
    experiment = tiny(tmp_path, steps=100_000, steps_per_call=10, checkpoint_every=50_000)
    sent: list[str] = []

    def stop(text):
        if "step " in text and not sent:
            sent.append(text)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        run_study([experiment], SEEDS[:2], tmp_path / "study", at_once=2, log=stop)
    results = [read_result(tmp_path / f"study/tiny/seed={seed}") for seed in (0, 1)]
    saved = [result for result in results if result is not None]
    assert saved and all(result["status"] == "preempted" and 0 < result["steps"] < 100_000 for result in saved)
