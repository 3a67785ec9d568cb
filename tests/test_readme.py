"""The README's mixer, added literally as it says in a copy of the checkout."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent

IMPULSE = """
import jax
import jax.numpy as jnp
from flax import nnx

from recollect.layers import MovingAverage
from recollect.layers.mixer import Place

mixer = MovingAverage().build(5, Place(), nnx.Rngs(params=jax.random.key(0)))
out = mixer(jnp.zeros((1, 3, 5)).at[0, 0, 2].set(1.0)).hidden  # the third channel's rate is 0: a half per token
assert jnp.allclose(out[0, 1], 0.5 * out[0, 0]) and jnp.allclose(out[0, 2], 0.25 * out[0, 0])
"""


def blocks() -> list[str]:
    section = (PROJECT / "README.md").read_text().split("## Your own mixer")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


def test_the_mixer(tmp_path):
    copy = tmp_path / "recollect"
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "runs", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "results"
    )
    shutil.copytree(PROJECT, copy, ignore=ignored, symlinks=True)
    mixer, line, experiment = blocks()
    assert len([line for line in mixer.splitlines() if line.strip()]) <= 40
    (copy / "layers" / "mixers" / "moving_average.py").write_text(mixer)
    init = copy / "layers" / "__init__.py"
    anchor = "from recollect.layers.mixers.sliding_window import"
    assert anchor in init.read_text()
    init.write_text(init.read_text().replace(anchor, line + anchor))
    (copy / "experiments" / "averages.py").write_text(experiment)
    (copy / "impulse.py").write_text(IMPULSE)
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
        "-k",
        "MovingAverage",
    )
    assert " passed" in out and "failed" not in out
    assert int(re.search(r"(\d+) passed", out).group(1)) >= 12
    run("impulse.py")
    run(
        "main.py",
        "train",
        "averages.moving_average",
        "run.steps=4",
        "run.steps_per_call=2",
        "run.batch_size=4",
        "data.evaluation_examples=8",
    )
