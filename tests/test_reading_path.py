"""What a newcomer reads for `train mqar.attention`: the files of which a traced run executes a function are those that
CONTRIBUTING.md lists, with their line counts. `python -m tests.test_reading_path` rewrites the counts."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^\| `(\S+\.py)` \| ([\d,]+) \|", re.M)
READING_LINES, SERVICES, TRACED_FILES, TRACED_LINES = 2418, 22, 44, 5325
"""Most that a run may take to read and to execute; to be lowered, not raised: the goal is 2,300, 12, 34 and 4,200."""

SCRIPT = """
import cProfile, json, sys, threading
from recollect.configuration import console
from recollect.main import main

threads = set()
threading.setprofile(lambda frame, event, argument: event == "call" and threads.add(frame.f_code))
profile = cProfile.Profile()
profile.enable()  # as sys.setprofile, but in C: Python's own takes minutes
console.SILENCE = 3600.0  # what is shown while a slow machine compiles is not part of it
code = main(["train", "mqar.attention", "run.steps=2"])
profile.disable()
codes = threads | {entry.code for entry in profile.getstats() if not isinstance(entry.code, str)}
with open(sys.argv[1], "w") as file:
    json.dump([[code.co_filename, code.co_name, code.co_firstlineno] for code in codes], file)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """Files of the project of which a two-step run executes a function, and their lines."""
    folder = tmp_path_factory.mktemp("traced")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "JAX_PLATFORMS": "cpu", "RECOLLECT_CACHE": str(folder)}
    command = [sys.executable, "-c", SCRIPT, str(folder / "codes.json")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files: dict[str, set] = {}
    for file, name, line in json.loads((folder / "codes.json").read_text()):
        path = Path(file).resolve()
        if path.suffix != ".py" or not path.is_relative_to(PROJECT):
            continue
        if not any(part.startswith(".") for part in path.relative_to(PROJECT).parts):
            files.setdefault(str(path.relative_to(PROJECT)), set()).add((name, line))
    return {file: lines(file) for file, called in files.items() if called & functions(PROJECT / file)}


def functions(path: Path) -> set[tuple[str, int]]:
    """Names and first lines of a file's functions; bodies of modules and classes are none."""
    nodes = ast.walk(ast.parse(path.read_text()))
    found = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {(node.name, min([node.lineno, *(one.lineno for one in node.decorator_list)])) for node in found}


def lines(file: str) -> int:
    return len((PROJECT / file).read_text().splitlines())


def listed(heading: str) -> dict[str, int]:
    """Files and line counts of the table under a heading of CONTRIBUTING.md."""
    section = (PROJECT / "CONTRIBUTING.md").read_text().partition(f"\n### {heading}\n")[2].partition("\n#")[0]
    return {file: int(count.replace(",", "")) for file, count in ROW.findall(section)}


def test_the_lists_are_true(traced):
    reading, services = listed("Reading path"), listed("Services")
    assert reading.keys() | services.keys() == traced.keys() and not reading.keys() & services.keys()
    assert {**reading, **services} == {file: lines(file) for file in traced}


def test_a_run_stays_readable(traced):
    reading, services = listed("Reading path"), listed("Services")
    print(f"reads {len(reading)} files, {sum(reading.values())} lines; traced {len(traced)}, {sum(traced.values())}")
    assert sum(reading.values()) <= READING_LINES and len(services) <= SERVICES
    assert len(traced) <= TRACED_FILES and sum(traced.values()) <= TRACED_LINES


if __name__ == "__main__":
    path = PROJECT / "CONTRIBUTING.md"
    path.write_text(ROW.sub(lambda row: f"| `{row[1]}` | {lines(row[1]):,} |", path.read_text()))
