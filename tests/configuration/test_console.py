"""What a person who waits is told: lines after silence, and the last line of a terminal."""

import functools
import io
import re
import time

import chz
import pytest

from recollect.configuration import console, terminal
from recollect.configuration.console import NOW, doing, lasting_output
from recollect.experiments.mqar import attention
from recollect.training.experiment import program_of


def test_silence_is_broken_by_what_is_being_done(monkeypatch, capsys):
    monkeypatch.setattr(console, "SILENCE", 0.5)
    with lasting_output("starting"):
        doing("compiling the steps", (0, 4, lambda: "loss 1.5"))
        time.sleep(2.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(re.fullmatch(r"  compiling the steps, [12] s loss 1.5", line) for line in lines)


def test_a_compilation_says_how_long_the_same_program_took_last(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path))
    monkeypatch.setattr(console, "SILENCE", 0.5)
    experiment = attention()
    for learning_rate, length in ((1e-2, 4), (1e-3, 4), (1e-3, 8)):
        optimizer = chz.replace(experiment.optimizer, learning_rate=learning_rate)
        program = functools.partial(_program, chz.replace(experiment, optimizer=optimizer), length)
        with lasting_output():
            doing("compiling the steps", None, program)
            time.sleep(1.4)
            doing("steps up to 4")
            time.sleep(0.2)
        last = " took 1 s last time" if (learning_rate, length) == (1e-3, 4) else ""
        assert capsys.readouterr().err == f"  compiling the steps, 1 s{';' if last else ''}{last}\n"
    kept = list((tmp_path / "compile_times").iterdir())
    assert len(kept) == 2 and all(1.3 < float(file.read_text()) < 2 for file in kept)


def _program(experiment, length):
    return program_of(experiment), length, {"rate": 0.1}


def test_output_is_not_followed_by_a_line_at_once(monkeypatch, capsys):
    with lasting_output():
        print("a line")
        time.sleep(1.2)
    assert capsys.readouterr() == ("a line\n", "")


class Screen(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_a_terminal_has_a_last_line_that_makes_way_for_output(monkeypatch):
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("sys.stdout", screen)
    with lasting_output("compiling"):
        time.sleep(0.5)
        print("step 1")
        time.sleep(0.5)
    text = screen.getvalue()
    assert text.startswith(f"{terminal.ERASE}compiling{terminal.ERASE}step 1\n{terminal.ERASE}compiling")
    assert text.endswith(terminal.ERASE)


@pytest.fixture
def job():
    text = terminal.LineText(bars="━─")
    doing("step", (1000, 2000, lambda: "loss 1.5"))
    NOW.since = 99.5
    yield text
    NOW.job = None


def test_the_bar_shows_the_share_and_when_the_job_ends(job):
    assert job.line(100.0, 79) == f"step  loss 1.5 {'━' * 15}{'─' * 15}  50%"
    doing("step", (1100, 2000, lambda: "loss 1.4"))
    NOW.since = 109.9
    # 100 steps in 10 s: what came before this process counts for nothing.
    assert job.line(110.0, 79).endswith("55%, 90 s left".replace("90 s", "2 min")) and "loss 1.4" in job.line(110.0, 79)
    assert job.line(110.0, 79).count("━") == round(0.55 * 30)


@pytest.mark.parametrize("width", range(1, 120))
def test_the_line_never_wraps(job, width):
    line = job.line(100.0, width)
    assert len(line) <= width and (width < 20 or line.startswith("step"))


def test_a_part_of_a_job_keeps_its_bar(job):
    doing("evaluating 3 of 8")
    assert job.line(time.monotonic() + 12, 79).startswith("evaluating 3 of 8, 12 s") and "50%" in job.line(130.0, 79)


def test_durations():
    assert [terminal.duration(seconds) for seconds in (5, 89, 91, 3600, 7500)] == [
        *("5 s", "89 s", "2 min", "60 min", "2 h 5 min")
    ]
