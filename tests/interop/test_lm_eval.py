"""The harness lm_eval on models here: three tasks made on the spot, whose results are computed by hand beside it."""

import json
import math
import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.data.tokenizers import ByteTokenizer
from recollect.export.huggingface import Facts, export_huggingface
from recollect.models import FunctionalModel, Sampling, continue_texts
from tests.export.huggingface.cases import MODELS, parameters
from tests.interop.comparison import PROJECT, PYTHON

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="no lm_eval here: `make test-interop` sets it up where it can"
)

MODEL = MODELS["llama"]
QUESTIONS = [("Key a is", [" one", " two", " three"], 1), ("Key bb is", [" x", " yy"], 0), ("", ["ab", "b"], 1)]
TEXTS = ["A text of some length, naïve and long enough for a window.", "Short."]
PROMPTS = ["def f(x):", "a", "The key of"]
COMMON = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0}


def write_task(folder, name, rows, **fields):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
    (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **COMMON, "dataset_kwargs": data, **fields}))


def run(*arguments, folder):
    offline = {"HF_HOME": str(folder / "cache"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    env = {**os.environ, "PYTHONPATH": str(PROJECT), **offline}
    done = subprocess.run([PYTHON, *arguments], cwd=PROJECT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("lm_eval")
    params = parameters(MODEL)
    export_huggingface(params, MODEL, root / "model", facts=Facts("toy"), tokenizer=ByteTokenizer())
    (root / "tasks").mkdir()
    metric = {"aggregation": "mean", "higher_is_better": True}
    write_task(
        root / "tasks",
        "toy_choice",
        [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS],
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        target_delimiter="",
        metric_list=[{"metric": "acc", **metric}],
    )
    write_task(
        root / "tasks",
        "toy_text",
        [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    model = FunctionalModel(MODEL, 257)
    continued = [""] * len(PROMPTS)
    for part in continue_texts(model, params, ByteTokenizer(), PROMPTS, 8, Sampling(temperature=0.0), ["\n"]):
        continued[part.row] += part.text
    continued[0] += "!"  # which no model says: two of three are right
    write_task(
        root / "tasks",
        "toy_continuation",
        [{"question": prompt, "answer": text} for prompt, text in zip(PROMPTS, continued, strict=True)],
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        metric_list=[{"metric": "exact_match", **metric}],
    )
    return root


@pytest.fixture(scope="module")
def log_probability():
    params, model = parameters(MODEL), FunctionalModel(MODEL, 257)
    logits = jax.jit(lambda params, tokens: jax.nn.log_softmax(model.bind(params)(tokens)))

    def of(context, continuation):
        ids = ByteTokenizer().encode(context + continuation)
        padded = np.zeros(64, np.int32)
        padded[: len(ids)] = ids
        each = np.asarray(logits(params, jnp.asarray(padded)[None])[0])[np.arange(len(ids) - 1), ids[1:]]
        return float(each[len(ids) - 1 - len(continuation.encode()) :].sum())

    return of


def test_the_harness_measures_what_the_model_says(folder, log_probability):
    names = "toy_choice,toy_text,toy_continuation"
    out = run(
        *("main.py", "evaluate", folder / "model", "--tasks", names, "--include-path", folder / "tasks"), folder=folder
    )
    tasks = json.loads(out[out.index("{") :])["tasks"]
    best = [np.argmax([log_probability(of, choice) for choice in choices]) for of, choices, _ in QUESTIONS]
    right = np.mean([chosen == answer for chosen, (_, _, answer) in zip(best, QUESTIONS, strict=True)])
    assert tasks["toy_choice"]["acc,none"] == pytest.approx(right)
    bits = -sum(log_probability("", text) for text in TEXTS) / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert tasks["toy_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    assert tasks["toy_continuation"]["exact_match,none"] == pytest.approx(2 / 3)


def test_its_own_command_line_knows_the_model(folder):
    model = ("--model", "recollect", "--model_args", f"run={folder / 'model'}")
    tasks = ("--tasks", "toy_choice", "--include_path", folder / "tasks", "--limit", "2")
    out = run("-m", "recollect.evaluation.harness", "run", *model, *tasks, folder=folder)
    assert "toy_choice" in out and "acc" in out
