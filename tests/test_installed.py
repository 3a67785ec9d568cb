"""The package as users have it: `recollect` alone is importable, and their own folders may have the names of ours."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture
def user(tmp_path):
    """A function that runs Python code in a folder that has packages `models` and `training`; returns its stdout."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "recollect").symlink_to(PROJECT / "recollect")
    folder = tmp_path / "user"
    for name in ("models", "training"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("MINE = True\n")

    def run(code: str) -> str:
        (folder / "script.py").write_text(code)
        environment = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(
            [sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_users_own_models_folder_breaks_nothing(user):
    code = """
import models, training
from recollect.experiments.mqar import recall
from recollect.layers import SlidingWindow
assert models.MINE and training.MINE
print(recall("mine", SlidingWindow(window=17)).name)
"""
    assert user(code) == "mine\n"


def test_the_command_works_in_any_folder(user):
    start = "from recollect.main import main\n"
    assert "mqar.attention " in user(start + "main(['list'])")
    tiny = ["data.vocab_size=32", "data.length=16", "data.pairs=2", "data.evaluation_examples=32", "model.width=8"]
    train = ["train", "mqar.attention", *tiny, "run.steps=2", "run.batch_size=8", "run.steps_per_call=2"]
    assert "result: runs/mqar.attention/result.json" in user(start + f"raise SystemExit(main({train!r}))")


@pytest.mark.slow
def test_a_wheel_holds_the_files_behind_the_links(tmp_path):
    pytest.importorskip("setuptools")
    checkout = tmp_path / "checkout"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for path in subprocess.run(listed, cwd=PROJECT, check=True, capture_output=True, text=True).stdout.splitlines():
        if (PROJECT / path).exists() and not path.startswith("."):
            (checkout / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / path, checkout / path, follow_symlinks=False)
    (checkout / "pallas_kernels/tuning/some_device.json").write_text("{}\n")  # as `tuning.measure` writes one
    options = ["--quiet", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "-w", tmp_path, "."]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("recollect-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert {name.split("/")[0] for name in names} == {"recollect"}
        for name in ("main.py", "layers/__init__.py", "training/checkpoint/integrity.py", "pallas_kernels/dispatch.py"):
            assert archive.read(f"recollect/{name}") == (PROJECT / name).read_bytes()
        assert "recollect/pallas_kernels/tuning/some_device.json" in names
