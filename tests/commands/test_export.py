"""`main.py export` and `import`, and what takes an export in place of a run."""

import json
import subprocess
import sys

from recollect.commands.export import measured
from recollect.evaluation import share_interval
from recollect.training.checkpoint.load import open_run
from recollect.training.run_folder import read_result
from tests.test_bad_input import PROJECT, command, refused, runs  # noqa: F401 - a fixture

LLAMA = "text.attention data.length=16 model.width=16 model.mlp.hidden=24 ...heads=2 model.stages.0.repeats=1"
LLAMA += " run.batch_size=4 run.steps=2 run.steps_per_call=1 run.evaluate_every=2 run.log_every=1"


def test_out_and_back(capsys, runs, tmp_path):  # noqa: F811
    corpus = f"data.source={runs / 'corpus.txt'}"
    assert command(["train", *LLAMA.split(), corpus, f"run.directory={tmp_path / 'run'}"]) == 0
    text, out, back = tmp_path / "run", tmp_path / "hf", tmp_path / "back"
    assert command(["export", text, out, "--format", "huggingface", "--license", "mit", "--shard-bytes", 9000]) == 0
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "corpus.txt" in card and "bits_per_byte" in card
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert command(["import", out, back]) == 0
    for folder in (out, back):
        assert "names no text; give some with data.source=" in refused(capsys, ["evaluate", folder])
    begin = ["train", *LLAMA.split(), corpus, f"run.directory={tmp_path / 'next'}", f"run.initialize={out}"]
    assert command([*begin, "run.steps=1", f"data.tokenizer={out}"]) == 0
    assert f"begins with the parameters of {out}, step 0" in capsys.readouterr().out
    assert command(["export", text, tmp_path / "native"]) == 0
    texts = []
    for folder in (text, out, back, tmp_path / "native"):
        capsys.readouterr()
        assert command(["generate", folder, "--tokens", 12, "--seed", 3]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    capsys.readouterr()
    assert command(["evaluate", back, corpus, "data.length=16"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    result = json.loads((text / "result.json").read_text())
    assert abs(metrics["bits_per_byte"] - result["bits_per_byte"]) < 1e-5


def test_a_model_card_has_what_was_measured_at_its_step(runs):  # noqa: F811
    run = open_run(runs / "recall")
    result = read_result(runs / "recall")
    found, examples = measured(result, run), run.experiment.data.evaluation_examples
    slices = sum(part.weight > 0 for part in run.experiment.data.evaluation_slices())
    assert found["results"]["accuracy"] == result["accuracy"]
    assert found["intervals"]["accuracy"] == share_interval(result["accuracy"], slices * examples)
    assert measured({**result, "status": "preempted"}, run) == measured({**result, "steps": 1}, run) == {}
    result = read_result(runs / "text")
    assert measured(result, open_run(runs / "text")).get("intervals", {}) == result["intervals"]


def test_load_from_a_plain_script(runs, tmp_path):  # noqa: F811
    assert command(["export", runs / "text", tmp_path / "out"]) == 0
    script = "import recollect; run = recollect.load('out'); print(run.model.vocabulary, sorted(run.params))"
    environment = {"PYTHONPATH": str(PROJECT), "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "257 ['embedding', 'final_norm', 'stack']\n", done.stderr


def test_mistakes(capsys, runs, tmp_path):  # noqa: F811
    asked = ["export", runs / "recall", tmp_path / "out", "--format", "huggingface"]
    assert "stands in the way of a Hugging Face export" in refused(capsys, asked)
    assert "shard_bytes=0" in refused(capsys, [*asked, "--shard-bytes", 0])
    programs = ["export", runs / "text", tmp_path / "out", "--format", "stablehlo", "--max-length"]
    assert "max_length=1: must be from 2 to" in refused(capsys, [*programs, 1])
    code = ["export", runs / "text", tmp_path / "out", "--code"]
    assert "--code: for --format huggingface, not safetensors" in refused(capsys, code)
    licensed = [*programs, 8, "--license", "mit"]
    assert "--license: for --format huggingface or gguf, not stablehlo" in refused(capsys, licensed)
    assert "nor an export" in refused(capsys, ["import", tmp_path, tmp_path / "out"])
    said = "is not there; import reads a folder of Hugging Face's"
    assert said in refused(capsys, ["import", tmp_path / "nothing", tmp_path / "out"])
    assert not (tmp_path / "out").exists()
    assert command([*programs, 8]) == 0
    assert "step.bin" in capsys.readouterr().out


def test_overrides_of_the_model_convert_it(capsys, runs, tmp_path):  # noqa: F811
    linear = "model.stages.0.pattern.1=LinearAttention(feature_map=Hedgehog)"
    assert command(["export", runs / "recall", tmp_path / "out", linear, "--transfer", 2]) == 0
    assert "attention transfer: loss" in capsys.readouterr().out
    assert "query_features" in (tmp_path / "out" / "manifest.json").read_text()
    asked = ["export", runs / "recall", tmp_path / "other"]
    assert "a model of 2 layers cannot become one of 4" in refused(capsys, [*asked, "model.stages.0.repeats=2"])
    assert not (tmp_path / "other").exists()
