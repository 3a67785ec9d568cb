"""The command line as a user meets it: every mistake is one `error:` line and exit code 2; the whole path runs from
clone to export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from recollect import main
from recollect.experiments.registry import entries, load

PROJECT = Path(__file__).resolve().parent.parent
TINY = [
    "data.vocab_size=32",
    "data.length=16",
    "data.pairs=2",
    "data.evaluation_examples=32",
    "model.width=8",
    "run.steps=4",
    "run.batch_size=8",
    "run.steps_per_call=2",
]


def run(capsys, *arguments):
    try:
        code = main.main(list(map(str, arguments)))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_list_is_quick_and_complete():
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "main.py", "list"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0 and time.perf_counter() - begun < 2
    for name in ("attention", "based", "window", "convolution", "hyena", "landmark", "mixture_of_heads", "small"):
        assert f"mqar.{name} " in done.stdout
    for name in ("attention", "based", "landmark", "mixture_of_heads"):
        assert f"text.{name} " in done.stdout


@pytest.mark.parametrize("name", [name for name, entry in entries().items() if entry.kind == "experiment"])
def test_every_experiment_loads_and_bears_its_name(name):
    experiment = load(name, "experiment")
    assert experiment.name == name and experiment.run.directory is None


@pytest.mark.parametrize("name", [name for name, entry in entries().items() if entry.kind == "study"])
def test_every_study_loads(name):
    study = load(name, "study")
    names = [(experiment.task, experiment.name) for experiment in study.experiments]
    assert len(names) == len(set(names)) and study.sweep


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "mqar.atention"], "did you mean mqar.attention"),
        (["train", "mqar.small"], "is a study"),
        (["compare", "mqar.attention"], "is an experiment"),
        (["train", "mqar.based", "optimizer.learning_rat=1"], "did you mean optimizer.learning_rate=1?"),
        (["train", "mqar.based", "optimizer.learning_rate=fast"], "fast"),
        (["train", "mqar.based", "optimizer.learning_rate=-1"], "must be positive"),
        (["train", "mqar.based", "learning_rate"], "path=value"),
        (["train", "mqar.based", "model.stages.0.pattern.1=Winow"], "no config class"),
        (["train", "mqar.based", "model.stages.0.pattern.1=os:system"], "refused"),
        (["train", "mqar.based", "data.pairs=40"], "pairs=40"),
        (["train", "mqar.attention", "model.stages.0.pattern.1.heads=7", *TINY], "heads=7"),
        (["train", "mqar.hyena", "data.length=128"], "at most 64"),
        (["train", "mqar.based", "run.mesh.data=64"], "64 devices"),
        (["train", "text.based", "data.source=/does/not/exist"], "/does/not/exist"),
        (["describe", "mqar.based", "--target", "gpu:h100"], "tpu:GENERATION:TOPOLOGY"),
        (["evaluate", "/does/not/exist"], "no run folder"),
        (["generate", "/does/not/exist"], "no run folder"),
        (["export", "/does/not/exist", "/tmp/x"], "no run folder"),
        (["compare", "mqar.small", "--only", "mqar.nothing"], "mqar.nothing"),
        (["compare", "mqar.small", "--with", "/does/not/exist.py"], "no file"),
        (["fly"], "invalid choice"),
        ([], "required"),
        (["train"], "required"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    lines = [line for line in err.strip().splitlines() if line]
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], err
    assert not list(tmp_path.rglob("checkpoints"))


def test_train_evaluate_export(capsys, tmp_path):
    folder = tmp_path / "run"
    code, out, err = run(capsys, "train", "mqar.based", *TINY, f"run.directory={folder}")
    assert code == 0, err
    result = json.loads((folder / "result.json").read_text())
    assert 0 <= result["accuracy"] <= 1 and result["steps"] == 4 and "result.json" in out
    assert "\n  LinearAttention: taylor_attention on xla\n" in out  # what its operations run on, before it trains
    code, out, _ = run(capsys, "evaluate", folder)
    assert code == 0 and json.loads(out)["accuracy"] == result["accuracy"]
    code, out, _ = run(capsys, "evaluate", folder, "data.length=24", "data.pairs=4")
    assert code == 0 and "24x4" in json.loads(out)["accuracy_by_slice"]
    code, _, err = run(capsys, "evaluate", folder, "model.width=16")
    assert code == 2 and "do not fit" in err
    code, _, err = run(capsys, "generate", folder)
    assert code == 2 and "needs a text model" in err
    code, _, _ = run(capsys, "export", folder, tmp_path / "out")
    assert code == 0 and {"model.safetensors", "config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    code, _, err = run(capsys, "export", folder, tmp_path / "out")
    assert code == 2 and err.count("\n") == 1
    code, _, err = run(capsys, "train", "mqar.based", *TINY, "optimizer.learning_rate=0.5", f"run.directory={folder}")
    assert code == 2 and "optimizer.learning_rate" in err


def test_exported_logits_are_the_runs_logits_bit_for_bit(capsys, tmp_path):
    import jax

    from recollect.export.safetensors_format import load_safetensors
    from recollect.models import FunctionalModel
    from recollect.training.checkpoint.load import open_run

    folder = tmp_path / "run"
    assert run(capsys, "train", "mqar.landmark", *TINY, f"run.directory={folder}")[0] == 0
    assert run(capsys, "export", folder, tmp_path / "out")[0] == 0
    saved = open_run(folder)
    assert "vocabulary=" in repr(saved) and "array(" not in repr(saved)
    params, config = load_safetensors(tmp_path / "out")
    assert config == saved.experiment
    model = FunctionalModel(config.model, config.data.vocabulary)
    tokens = jax.random.randint(jax.random.key(0), (2, 15), 0, 32)
    logits = jax.jit(lambda params: model.bind(params)(tokens))
    np.testing.assert_array_equal(np.asarray(logits(saved.params)), np.asarray(logits(params)))


def test_describe(capsys):
    code, out, _ = run(capsys, "describe", "mqar.based", "run.batch_size=4")
    assert code == 0
    for part in (
        "embedding",
        "mixers: BaseConvolution",
        "mixers: LinearAttention",
        "total",
        "FLOPs per token",
        "bytes",
        "operations on cpu",
        "LinearAttention: taylor_attention on xla",
        "compiles here",
        "memory per device",
    ):
        assert part in out
    code, out, _ = run(capsys, "describe", "mqar.hyena", "run.batch_size=4")
    assert code == 0 and "longer than this model's maximum of 64" in out


MINE = """
import chz
from recollect.layers.mixers.linear_attention import LinearAttention
from recollect.layers.modules.feature_maps import Relu

mine = LinearAttention(feature_map=Relu(), feature_dim=4)
"""


def test_compare_with_a_mixer_of_ones_own_and_skip_what_is_done(capsys, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    out_folder = tmp_path / "study"
    command = [
        "compare",
        "mqar.small",
        "--out",
        out_folder,
        "--with",
        tmp_path / "mine.py",
        "--only",
        "mine",
        "--only",
        "mqar.attention",
        *TINY,
    ]
    code, out, err = run(capsys, *command)
    assert code == 0, err
    assert "mine" in out and "mqar.attention" in out
    for name in ("results.csv", "recall_vs_state.png", "accuracy_by_slice.png", "learning_curves.png"):
        assert (out_folder / name).stat().st_size > 100
    stamps = {path: path.stat().st_mtime_ns for path in out_folder.rglob("result.json")}
    assert len(stamps) == 8
    code, out, _ = run(capsys, *command)
    assert code == 0 and out.count("already finished") == 8
    assert stamps == {path: path.stat().st_mtime_ns for path in out_folder.rglob("result.json")}


def test_a_broken_file_of_the_users_is_named(capsys, tmp_path):
    (tmp_path / "broken.py").write_text("x = 1\ny = x / 0\n")
    code, _, err = run(capsys, "compare", "mqar.small", "--with", tmp_path / "broken.py")
    assert code == 2 and "broken.py fails at line 2: ZeroDivisionError" in err


@pytest.mark.slow
def test_import_and_first_step_take_less_than_20_seconds(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    script = f"""
import sys
sys.path.insert(0, {str(PROJECT)!r})
from recollect.experiments.mqar import attention
from recollect.training.step import member_values, program_for
e = attention()
p = program_for(e)
s, m = p.train(p.init(0), member_values([e], False), 1, e.data.train_slices()[0])
print(float(m["loss"][0]))
"""
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    print(f"{seconds:.1f} s to the first step's loss, {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr
    assert seconds < 20


def test_recall_data_in_three_lines_from_anywhere(tmp_path):
    """The README's library use, from a script outside the repository."""
    script = (
        "from recollect.data.synthetics import MQAR\ntask = MQAR(vocab_size=256, length=64, pairs=8)\n"
        "batch = task.train_batch(seed=0, step=0, batch_size=4)\nprint(batch.tokens.shape)\n"
    )
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.strip() == "(4, 64)", done.stderr
