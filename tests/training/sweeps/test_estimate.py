"""The estimate of a study's time: what is timed, the fit, and a study of two mixers on two tasks from end to end."""

import json
import re

import chz
import numpy as np
import pytest

from recollect.training.sweeps.estimate import FILE, Timing, chosen, fitted
from recollect.training.sweeps.study import hours, run_study
from tests.training.tiny import tiny

GRID = [((f"mixer {m}", 0), f"task {k}") for k in range(3) for m in range(4)]


def test_a_cross_of_the_grid_is_timed_and_what_a_part_of_it_lacks():
    assert len(chosen(GRID)) == 6
    part = [cell for cell in GRID if cell[0][0] != "mixer 0" or cell[1] == "task 2"]
    cells = chosen(part)
    assert {cell[0] for cell in cells} == {cell[0] for cell in GRID} and {cell[1] for cell in cells} == {
        "task 0",
        "task 1",
        "task 2",
    }


def test_times_that_are_products_of_mixer_and_task_are_found_from_a_cross():
    random = np.random.default_rng(0)
    mixers, tasks = random.uniform(0.1, 3, (4, 4)), random.uniform(0.5, 2, (3, 4))
    every = {cell: Timing(*(mixers[int(cell[0][0][-1])] * tasks[int(cell[1][-1])])) for cell in GRID}
    found = fitted({cell: every[cell] for cell in chosen(GRID)}, GRID)
    for cell in GRID:
        assert np.allclose(list(vars(found[cell]).values()), list(vars(every[cell]).values()))


def test_the_seconds_of_a_group_count_compilation_once(tmp_path):
    group = [tiny(tmp_path, steps=50, evaluate_every=20)] * 3
    assert Timing(10.0, 1.0, 0.1, 0.5).seconds(group) == pytest.approx(10 + 3 * (1 + 50 * 0.1 + 3 * 0.5))
    assert (hours(8640), hours(600)) == ("2.4 hours", "10 minutes")


def test_a_study_states_its_time_first_and_is_timed_once(tmp_path):
    task = chz.replace(tiny(tmp_path, steps=30, steps_per_call=5), task="recall")
    said: list[str] = []
    folders = run_study([task], ({"run.seed": 0}, {"run.seed": 1}), tmp_path, estimate=True, log=said.append)
    assert re.match(r"runs to train: 2, about \d+ \w+ \(1 of 1 programs timed in .*, 1 process\)", said[0])
    assert [str(folder.relative_to(tmp_path)) for folder in folders] == ["recall/tiny/seed=0", "recall/tiny/seed=1"]
    (timing,) = json.loads((tmp_path / FILE).read_text()).values()
    assert 0 < timing["step"] < timing["compile"] and not (tmp_path / "timing").exists()
    said.clear()
    run_study([task], ({"run.seed": 0}, {"run.seed": 2}), tmp_path, estimate=True, log=said.append)
    assert re.match(r"runs to train: 1, about \d+ \w+ \(timed before; ", said[0])
