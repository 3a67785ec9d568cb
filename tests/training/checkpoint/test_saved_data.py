"""Checkpoints are self-contained: a run whose text has moved or gone is exported, generated from, evaluated on other
text and resumed; a corpus that has changed is named."""

import json
import shutil

import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.data.text import Text, dataset
from recollect.data.tokenizers import ByteTokenizer
from recollect.main import main
from recollect.models.functional import flatten
from recollect.training.checkpoint.load import open_run
from recollect.training.checkpoint.saved_data import SavedData, with_tokenizer_of
from recollect.training.recovery.replay import load_failure, save_failure

TINY = (
    *("data.length=32", "model.width=16", "model.stages.0.repeats=1", "...heads=2", "model.mlp=None"),
    *("run.batch_size=4", "run.sample_every=0", "run.steps_per_call=2", "run.compile_cache=off"),
)


def write_words(folder, seed):
    random = np.random.default_rng(seed)
    choices = np.array(["attention", "recall", "state", "naïve", "kernel", "\n", "head"])
    folder.mkdir()
    for index in range(60):
        (folder / f"{index}.txt").write_text(" ".join(random.choice(choices, int(random.integers(5, 90)))))
    return folder


def forget_what_was_opened():
    """As a new process: nothing that this one has opened is known any more."""
    for cached in (dataset._prepared, dataset._tokenizer, dataset._held_out, dataset._rows):
        cached.cache_clear()


def command(capsys, *arguments):
    """Exit code, stdout and stderr of one command, as a process of its own would give them."""
    forget_what_was_opened()
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps on a folder prepared with a BPE; then the folder is moved away."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECOLLECT_CACHE", str(root / "cache"))
        prepare = ["prepare", str(write_words(root / "words", 0)), str(root / "prepared"), "--tokenizer", "bpe:280"]
        assert main([*prepare, "--processes", "1"]) == 0
        train = ["train", "text.attention", *TINY, "run.steps=2", f"data.source={root / 'prepared'}"]
        assert main([*train, f"run.directory={root / 'run'}"]) == 0
    (root / "prepared").rename(root / "moved")
    return root


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of that run."""
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def test_a_run_without_its_text_is_exported_with_vocabulary_and_tokenizer(trained, run, tmp_path, capsys):
    code, out, err = command(capsys, "export", run, tmp_path / "out")
    assert code == 0, err
    extra = json.loads((tmp_path / "out" / "manifest.json").read_text())["extra"]
    assert extra["vocabulary"] == 280 and extra["corpus"]["source"] == str(trained / "prepared")
    exported, prepared = (folder / "tokenizer.json" for folder in (tmp_path / "out", trained / "moved"))
    assert exported.read_bytes() == prepared.read_bytes() and "tokenizer.json" in out
    assert len(extra["tokenizer"]["digest"]) == 64 and extra["step"] == 2


def test_a_run_without_its_text_continues_a_prompt(trained, run, capsys):
    asked = ["generate", run, "--prompt", "attention recall", "--tokens", 8]
    code, out, err = command(capsys, *asked)
    assert code == 0 and out.startswith("attention recall"), err
    assert command(capsys, *asked, f"data.source={trained / 'moved'}")[:2] == (0, out)


def test_a_run_without_its_text_is_evaluated_on_the_text_that_an_override_names(trained, run, tmp_path, capsys):
    code, out, err = command(capsys, "evaluate", run)
    assert code == 2 and err.count("\n") == 1 and str(trained / "prepared") in err, "the missing folder is named"

    code, out, err = command(capsys, "evaluate", run, f"data.source={trained / 'moved'}")
    metrics, result = json.loads(out), json.loads((run / "result.json").read_text())
    assert code == 0 and err == "", "the same corpus"
    assert metrics["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-6)
    assert metrics["corpus"] == {"source": str(trained / "moved"), "digest": result["corpus"]["digest"]}

    other = write_words(tmp_path / "other", 1)
    code, out, err = command(capsys, "evaluate", run, f"data.source={other}")
    metrics = json.loads(out)
    assert code == 0 and metrics["corpus"]["source"] == str(other) and metrics["targets"] < metrics["bytes"]
    lines = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1 and str(other) in lines[0] and result["corpus"]["digest"][:12] in lines[0]
    assert metrics["corpus"]["digest"][:12] in lines[0]


def test_text_of_another_tokenizer_is_refused(trained, run, tmp_path, capsys):
    words = trained / "words"
    assert command(capsys, "prepare", words, tmp_path / "bytes", "--processes", 1)[0] == 0
    code, _, err = command(capsys, "evaluate", run, f"data.source={tmp_path / 'bytes'}")
    assert code == 2 and err.count("\n") == 1 and "was prepared with 'bytes'" in err
    code, _, err = command(capsys, "generate", run, "data.tokenizer=bytes")
    assert code == 2 and err.count("\n") == 1 and "data.tokenizer='bytes'" in err


def test_a_run_goes_on_from_a_moved_source_if_its_digest_is_the_same(trained, run, tmp_path, capsys):
    train = ["train", "text.attention", *TINY, "run.steps=4", f"run.directory={run}"]
    code, _, err = command(capsys, *train, f"data.source={trained / 'prepared'}")
    assert code == 2 and str(trained / "prepared") in err
    assert command(capsys, "prepare", trained / "words", tmp_path / "bytes", "--processes", 1)[0] == 0
    code, _, err = command(capsys, *train, f"data.source={tmp_path / 'bytes'}")
    assert code == 2 and err.count("\n") == 1 and "data.source" in err and "sha256" in err
    assert json.loads((run / "config.json").read_text())["data"]["source"] == str(trained / "prepared")
    code, out, err = command(capsys, *train, f"data.source={trained / 'moved'}")
    assert code == 0 and "resumed at step 2" in out, err
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 4 and result["corpus"]["source"] == str(trained / "moved")


def test_a_failed_step_is_opened_without_its_text(trained, run, tmp_path):
    (tmp_path / "text").symlink_to(trained / "moved")
    forget_what_was_opened()
    opened = open_run(run, [f"data.source={tmp_path / 'text'}"])
    batch = opened.experiment.data.batches(0, 4).read(0, 0, 4)
    save_failure(tmp_path / "failure", opened.experiment, opened.params, batch, 0)
    (tmp_path / "text").unlink()
    forget_what_was_opened()
    experiment, params, _, _ = load_failure(tmp_path / "failure")
    assert experiment.data.vocabulary == 280 and flatten(params).keys() == flatten(opened.params).keys()


def test_the_missing_source_is_named_never_guessed(capsys, tmp_path):
    code, _, err = command(capsys, "describe", "text.attention", f"data.source={tmp_path / 'nowhere'}")
    assert code == 2 and err.count("\n") == 1 and str(tmp_path / "nowhere") in err


def test_a_changed_corpus_is_named_when_a_run_is_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    words, folder = write_words(tmp_path / "words", 0), tmp_path / "run"
    train = ["train", "text.attention", *TINY, "run.steps=2", f"data.source={words}", "data.tokenizer=bpe:270"]
    assert command(capsys, *train, f"run.directory={folder}")[0] == 0
    code, out, err = command(capsys, "evaluate", folder)
    before = json.loads(out)
    assert code == 0 and "warning" not in err and before["corpus"]["source"] == str(words)
    (words / "new.txt").write_text("zebra quilt " * 400)
    code, out, err = command(capsys, "evaluate", folder)
    assert code == 0, err
    lines = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1 and before["corpus"]["digest"][:12] in lines[0]
    after = json.loads(out)["corpus"]["digest"]
    assert after[:12] in lines[0] and after != before["corpus"]["digest"]


@pytest.mark.parametrize(
    ("tokenizer", "fields", "message"),
    [
        (ByteTokenizer(), {"source": "ids.npy"}, "unknown tokenizer, and the run reads bytes"),
        (None, {"source": "text.txt"}, "is text, and the run reads token ids of an unknown tokenizer"),
        (None, {"source": "wide.npy"}, "has ids up to 99, and the run's model has 65 ids"),
    ],
)
def test_text_and_token_ids_are_not_mixed(tmp_path, monkeypatch, tokenizer, fields, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    np.save("ids.npy", np.arange(650) % 65)
    np.save("wide.npy", np.arange(650) % 100)
    (tmp_path / "text.txt").write_text("words " * 100)
    saved = SavedData(257 if tokenizer else 65, tokenizer, "bytes", None, None)
    with pytest.raises(UserError, match=message):
        with_tokenizer_of(saved, Text(**fields))
    same = Text(source="text.txt" if tokenizer else "ids.npy")
    assert with_tokenizer_of(saved, same) == same
