"""`main.py bench recurrences`: both sides in turns, and that one which fails or hangs leaves the other's times."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from recollect.benchmarks import recurrences
from recollect.benchmarks.peer_process import PeerProcess
from recollect.configuration import UserError

SIZES = ["--cases", "simple_gla", "--shapes", "1,20,2,4", "--turns", "1", "--seconds", "0"]


@pytest.fixture
def interpreter(tmp_path):
    """interpreter(lines): a program that stands for the peer's Python: it is run with the script and the side."""

    def make(*lines):
        path = tmp_path / "python"
        path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
        path.chmod(0o755)
        return str(path)

    return make


def _run(arguments, tmp_path):
    code = recurrences.main([*SIZES, *arguments, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*/recurrences.json")
    (row,) = json.loads(path.read_text())["rows"]
    return code, row


def test_both_sides_are_compared_timed_and_written(tmp_path, capsys, interpreter):
    code, row = _run(["--peer-python", interpreter(f"exec {sys.executable} $1 ours")], tmp_path)
    assert code == 0 and row["wrong"] == [] and set(row["differs"]) == {"o", "dq", "dk", "dv", "dg"}
    times = [row[side][part] for side in ("ours", "peer") for part in ("forward", "both")]
    assert all(time["clock"] > 0 and time["cpu"] > 0 for time in times)
    assert "ours: python" in capsys.readouterr().out


def test_a_peer_without_the_library_says_so(tmp_path, interpreter):
    _, row = _run(["--peer-python", interpreter(f"exec {sys.executable} -S $1 peer")], tmp_path)
    assert "No module named 'jla'" in row["peer"]["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "1,2,3"], "'1,2,3' is not four sizes of at least 1"),
        (["--shapes", "a,2,3,4"], "'a,2,3,4' is not four sizes of at least 1"),
        (["--shapes", "0,2,3,4"], "'0,2,3,4' is not four sizes of at least 1"),
        (["--patience", "-1"], "--patience must be at least 0; got -1"),
        (["--seconds", "nan"], "--seconds must be at least 0; got nan"),
        (["--out", __file__], "test_recurrences.py is no folder that can be written to"),
    ],
)
def test_a_mistake_is_said_before_anything_is_measured(arguments, message, capsys):
    with pytest.raises(UserError, match="bench recurrences: ") as error:
        recurrences.main(arguments)
    assert message in str(error.value) and capsys.readouterr().out == ""


def test_a_dead_peer_leaves_our_times(tmp_path, capsys, interpreter):
    code, row = _run(["--peer-python", interpreter("echo lost >&2", "exit 3")], tmp_path)
    assert code == 0 and row["ours"]["both"]["clock"] > 0
    assert row["peer"]["error"] == "the process ended: exit code 3: lost" in capsys.readouterr().out


def test_a_hung_side_is_killed(interpreter):
    process = PeerProcess("--peer-python", interpreter("exec sleep 100"), ["recurrence_sides.py", "peer"], 0.1)
    assert process.ask({"part": "forward", "seconds": 0.0}) == {"error": "no answer in 0.1 s: killed"}
    process.close()
    assert process.process.returncode == -9


def test_differences_are_relative_to_ours():
    ours = {"o": np.array([3.0, 4.0], np.float32)}
    differs = recurrences._differences(ours, {"o": np.array([3.0, 4.5], np.float32)})
    assert differs == {"o": pytest.approx(0.1)}


@pytest.mark.parametrize("case", recurrences.GATES)
def test_inputs_are_what_the_recurrences_take(case):
    arrays = recurrences.draw(case, (2, 5, 3, 4))
    assert all(x.dtype == np.float32 for x in arrays.values())
    assert "g" not in arrays or (arrays["g"] < 0).all()
    assert set(arrays) == {"q", "k", "v", "cotangent", *recurrences.GATES[case]}


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--turns", "0"], "--turns"),
        (["--cases", "mamba"], "no case 'mamba'"),
        (["--shapes", "1,2,3"], "--shapes"),
        (["--same-python"], "--same-python"),
    ],
)
def test_options_that_do_not_fit_are_named(arguments, named):
    with pytest.raises(UserError, match=named):
        recurrences.main(arguments)


def test_an_interpreter_that_does_not_run_is_named():
    with pytest.raises(UserError, match="/nowhere/python"):
        recurrences.main([*SIZES, "--peer-python", "/nowhere/python"])
