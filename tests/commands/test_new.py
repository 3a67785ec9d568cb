"""`recollect new` writes files that work as they are, in a folder of one's own and in a checkout."""

import ast
import os
import shutil
import subprocess
import sys

import pytest

from recollect.commands import new
from recollect.configuration import python_files
from tests.commands.test_own_files import run

TINY = ["data.length=16", "data.evaluation_examples=16", "run.steps=2", "run.steps_per_call=1", "run.batch_size=4"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    python_files.forget()


def test_a_mixer(capsys):
    code, out, _ = run(capsys, "new", "mixer", "moving_average")
    assert code == 0 and "next: recollect check moving_average.py" in out
    laws = [f"--law={number}" for number in (1, 2, 3, 4, 5, 6, 7, 9, 10, 11)]
    code, out, err = run(capsys, "check", "moving_average.py", *laws)
    assert code == 0 and "MovingAverage: MovingAverage(" in out and "11 hold, 0 skipped, 0 fail" in out, out + err
    code, _, err = run(capsys, "train", "moving_average.py", *TINY, "data.pairs=2", "model.width=16")
    assert code == 0, err


def test_a_task(capsys, folder):
    assert run(capsys, "new", "task", "CopyAgain")[0] == 0
    code, _, err = run(capsys, "train", "copy_again.py", *TINY, "model.width=8")
    assert code == 0 and (folder / "runs" / "copy_again" / "result.json").exists(), err


def test_a_study(capsys):
    assert run(capsys, "new", "study", "rates")[0] == 0
    code, out, err = run(capsys, "compare", "rates.py", "--only", "window", *TINY, "data.pairs=2", "model.width=8")
    assert code == 0 and "window" in out, err


def test_nothing_is_overwritten(capsys, folder):
    (folder / "moving_average.py").write_text("mine")
    for name in ("moving_average", "MovingAverage"):
        code, _, err = run(capsys, "new", "mixer", name)
        assert code == 2 and "moving_average.py is there already, and is not overwritten" in err
    assert (folder / "moving_average.py").read_text() == "mine"


@pytest.mark.parametrize("module", ["json", "jax", "recollect"])
def test_the_name_of_a_module_is_refused(capsys, folder, module, monkeypatch):
    """Of the standard library, of an installed package, and of this one, which only a finder of its own may know."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry and entry != str(new.PROJECT)])
    code, _, err = run(capsys, "new", "study", module)
    assert code == 2 and f"{module}.py would hide the module {module}" in err and not list(folder.iterdir())


@pytest.fixture
def checkout(folder, monkeypatch):
    """A folder with the files of a checkout that `new` changes."""
    for file in ("layers/__init__.py", "data/__init__.py", "data/synthetics/__init__.py"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(new.PROJECT / file, folder / file)
    for path in ("layers/mixers", "experiments", "tests/layers/mixers", "tests/data/synthetics"):
        (folder / path).mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(new, "PROJECT", folder)
    return folder


def test_in_the_checkout_a_mixer(capsys, checkout):
    before = (checkout / "layers/__init__.py").read_text().splitlines()
    assert run(capsys, "new", "mixer", "moving_average")[0] == 0
    after = (checkout / "layers/__init__.py").read_text().splitlines()
    line = "from recollect.layers.mixers.moving_average import MovingAverage, MovingAverageMixer"
    assert [one for one in after if one != line] == before and sorted(after) == sorted([*before, line])
    assert after[after.index(line) - 1] < line < after[after.index(line) + 1]
    for file in ("layers/mixers/moving_average.py", "tests/layers/mixers/test_moving_average.py"):
        assert "NewMixer" not in (checkout / file).read_text() and ast.parse((checkout / file).read_text())
    assert "recollect.experiments" not in (checkout / "layers/mixers/moving_average.py").read_text()
    experiment = (checkout / "experiments/moving_average.py").read_text()
    assert "from recollect.layers import MovingAverage\n" in experiment and "-> Experiment" in experiment
    code, _, err = run(capsys, "new", "mixer", "moving_average")
    assert code == 2 and "is there already" in err
    assert (checkout / "layers/__init__.py").read_text().splitlines() == after


def test_in_the_checkout_a_task(capsys, checkout):
    assert run(capsys, "new", "task", "copy_again")[0] == 0
    exported = (checkout / "data/synthetics/__init__.py").read_text()
    assert "from recollect.data.synthetics.copy_again import CopyAgain\n" in exported
    assert "CopyAgain" in (checkout / "data/__init__.py").read_text()
    assert "Experiment" not in (checkout / "data/synthetics/copy_again.py").read_text()
    assert (checkout / "experiments/copy_again.py").exists()
    assert (checkout / "tests/data/synthetics/test_copy_again.py").exists()


def test_imports_stay_sorted():
    text = "from a.b import X\nfrom a.d import (\n    Y,\n)\nfrom c import Z\n"
    for module, before in (("a", "from a.b"), ("c", "from a.d"), ("e", "from c")):
        line = f"from a.{module} import W\n"
        assert new._with_import(text, line) == text.replace(before, line + before)


def test_in_the_checkout_a_study(capsys, checkout):
    assert run(capsys, "new", "study", "rates")[0] == 0
    assert "def rates() -> Study" in (checkout / "experiments/rates.py").read_text()


@pytest.mark.slow
def test_what_is_written_into_a_checkout_passes_its_tests_and_lint(folder):
    """In a copy of this one."""
    copy = folder / "copy"
    ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")
    shutil.copytree(new.PROJECT, copy, ignore=ignored, symlinks=True)
    environment = {**os.environ, "PYTHONPATH": str(copy), "JAX_PLATFORMS": "cpu"}

    def python(*arguments):
        line = [sys.executable, *arguments]
        done = subprocess.run(line, cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    for kind, name in (("mixer", "moving_average"), ("task", "copy_again"), ("study", "rates")):
        python("main.py", "new", kind, name)
    listed = python("main.py", "list")
    assert all(name in listed for name in ("moving_average.moving_average", "copy_again.copy_again", "rates.rates"))
    tests = ["tests/layers/mixers/test_moving_average.py", "tests/data/synthetics/test_copy_again.py"]
    tests += ["tests/test_public_names.py", "tests/layers/test_mixer_laws.py"]
    chosen = "moving_average or copy_again or test_every or (law_3 and MovingAverage)"
    python("-m", "pytest", "-p", "no:cacheprovider", *tests, "-k", chosen)
    for check in (["check"], ["format", "--check"]):
        python("-m", "ruff", *check, "layers", "data", "experiments", "tests/layers/mixers", "tests/data")
    python("main.py", "train", "copy_again.copy_again", *TINY, "model.width=8")
