"""The README's four steps to add a mixer, followed literally in a copy of the checkout."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def blocks() -> list[str]:
    section = (PROJECT / "README.md").read_text().split("## Adding a mixer")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


def test_the_four_steps(tmp_path):
    copy = tmp_path / "recollect"
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "runs", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "results"
    )
    shutil.copytree(PROJECT, copy, ignore=ignored, symlinks=True)
    mixer, line, experiment, test = blocks()
    (copy / "layers" / "mixers" / "moving_average.py").write_text(mixer)
    init = copy / "layers" / "__init__.py"
    anchor = "from recollect.layers.mixer import MixerConfig\n"
    init.write_text(init.read_text().replace(anchor, anchor + line))
    (copy / "experiments" / "averages.py").write_text(experiment)
    (copy / "tests" / "layers" / "mixers" / "test_moving_average.py").write_text(test)
    environment = {**os.environ, "PYTHONPATH": str(copy), "JAX_PLATFORMS": "cpu"}

    def run(*arguments):
        done = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    assert "averages.moving_average" in run("main.py", "list")
    out = run(
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/layers/test_mixer_laws.py",
        "tests/layers/mixers/test_moving_average.py",
        "-k",
        "MovingAverage or impulse",
    )
    assert " passed" in out and "failed" not in out
    assert int(re.search(r"(\d+) passed", out).group(1)) >= 12
    run(
        "main.py",
        "train",
        "averages.moving_average",
        "run.steps=4",
        "run.steps_per_call=2",
        "run.batch_size=4",
        "data.evaluation_examples=8",
    )


def test_the_library_example_runs():
    text = (PROJECT / "README.md").read_text()
    example = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "MQAR" in block)
    scope: dict = {}
    exec(example, scope)
    assert scope["batch"].tokens.shape == (4, 64)
    assert len([line for line in example.splitlines() if line.strip()]) == 3
