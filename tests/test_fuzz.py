"""Command lines drawn from the parser's commands and the config tree, and damaged files: every one ends with exit code
0, 2 or 3 (or 1: `replay` found nothing to reproduce), without a traceback, and touches nothing but the folder it names.
"""

import os
import shutil
import sys

import chz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recollect import main
from recollect.configuration import known_configs
from recollect.experiments.registry import load
from tests.test_bad_input import RECALL, TEXT, command, runs  # noqa: F401 - a fixture

EXPERIMENTS = ("mqar.attention", "mqar.based", "mqar.landmark", "mqar.mixture_of_heads", "mqar.hyena", "mqar.window")
NUMBERS = (
    "-1",
    "0",
    "1",
    "2",
    "3",
    "5",
    "16",
    "32",
    "2147483648",
    "1000000000000",
    "0.5",
    "1e-3",
    "1e400",
    "nan",
    "-0.0",
)
WORDS = (
    "None",
    "none",
    "True",
    "no",
    "",
    "()",
    "(1,2)",
    "a.b",
    "os:system",
    "lambda: 0",
    "é",
    "$",
    "~",
    "../x",
    "'",
    "=",
)
PATHS = {name: list(chz.beta_to_blueprint_values(load(name, "experiment"))) for name in EXPERIMENTS}
NOT_DRAWN = ("run.directory", "run.compile_cache")
"""Fields that name folders: drawn values would name others than those of the test."""


def overrides(name):
    """Overrides of an experiment's fields: mostly of real ones, by path or by wildcard."""
    fields = st.sampled_from([path for path in PATHS[name] if path and path not in NOT_DRAWN])
    wild = fields.map(lambda path: "..." + path.rpartition(".")[2])
    broken = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
    values = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.sampled_from(sorted(known_configs())))
    paths = st.one_of(fields, fields, fields, wild, broken).filter(lambda path: path.strip(".") not in NOT_DRAWN)
    return st.lists(st.tuples(paths, values).map("=".join), max_size=3)


def trained(name):
    """`train` or `describe`, small enough to run."""
    return overrides(name).map(
        lambda drawn: ["train", name, *RECALL[1:], *drawn, "run.directory=RUN", "run.compile_cache=off"]
    )


OPTIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["--seed", "--temperature", "--top-p", "--tokens"]), st.sampled_from(NUMBERS)),
        st.tuples(st.just("--prompt"), st.text(max_size=5)),
    ),
    max_size=2,
).map(lambda pairs: [text for pair in pairs for text in pair])

LINES = st.one_of(
    st.sampled_from(EXPERIMENTS).flatmap(trained),
    st.sampled_from([["evaluate", "RUN"], ["export", "RUN", "OUT"], ["train", *RECALL, "run.directory=RUN"]]),
    OPTIONS.map(lambda options: ["generate", "TEXT", *options]),
    st.tuples(
        st.sampled_from([*main.COMMANDS, "x"]), st.lists(st.sampled_from(["RUN", "--out", "-1", "x=1"]), max_size=2)
    )
    .filter(lambda pair: pair[0] not in ("bench", "describe", "compare", "prepare") or not pair[1])
    .map(lambda pair: [pair[0], *pair[1]]),
)

FILES = ("config.json", "metrics.jsonl", "result.json", "environment.json", "checkpoints/2/meta.json")
FILES += ("checkpoints/2/digests.json", "checkpoints/2/state/_METADATA", "checkpoints/2")
DAMAGES = {
    "truncate": lambda data, at: data[: at % (len(data) + 1)],
    "flip": lambda data, at: data[: at % len(data)] + bytes([data[at % len(data)] ^ 0xFF]) + data[at % len(data) + 1 :],
    "empty": lambda data, at: b"",
    "list": lambda data, at: b"[]",
    "nested": lambda data, at: b"[" * 100_000,
    "zeros": lambda data, at: bytes(len(data)),
}
DAMAGE = st.one_of(
    st.none(), st.tuples(st.sampled_from(FILES), st.sampled_from(["delete", *DAMAGES]), st.integers(0, 10_000))
)


def harm(folder, damage):
    """Damages one file of a run."""
    name, kind, at = damage
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
    elif kind == "delete":
        path.unlink()
    else:
        path.write_bytes(DAMAGES[kind](path.read_bytes(), at))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check(runs, folder, line, damage):  # noqa: F811
    """Runs one command line in `folder` on a (damaged) copy of a run."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "home").mkdir(parents=True)
    (folder / "here").mkdir()
    os.chdir(folder / "here")  # of the test's own: commands that name no folder may write there
    run = folder / "run"
    if damage is not None or "run.directory=RUN" not in line:
        shutil.copytree(runs / "recall", run)
    if damage is not None:
        harm(run, damage)
    places = {"RUN": str(run), "OUT": str(folder / "out"), "TEXT": str(runs / "text")}
    asked = [places.get(text, text.replace("=RUN", f"={run}")) for text in line]
    code = command(asked)
    # `replay` says with 1 that a step was finite.
    assert code in (0, 2, 3) or (code == 1 and asked[0] == "replay"), (asked, code)
    assert {path.name for path in folder.iterdir()} <= {"home", "here", "run", "out"}
    assert not list((folder / "home").iterdir())


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """A working folder and a home of the test's own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "work" / "home"))
    monkeypatch.setattr(sys, "argv", ["recollect"])
    return tmp_path / "work"


COUNT = int(os.environ.get("FUZZ", "0"))
"""How many new command lines to draw; by default the same hundred each time."""


@settings(
    max_examples=COUNT or 100,
    derandomize=not COUNT,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(line=LINES, damage=DAMAGE)
def test_command_lines_end_well(runs, quiet, line, damage):  # noqa: F811
    check(runs, quiet, line, damage)
