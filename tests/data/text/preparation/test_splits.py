"""Splits: by the names of files and folders, by the card of a data set, and as asked for; test text is never trained
on."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from recollect.data.text.preparation.splits import split_by_name
from tests.data.text.preparation.prepared_folders import (
    all_texts_of,
    prepare_command,
    refused,
    texts_of,
    write_lines,
)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.txt", "train"),
        ("data/train-00000-of-00003.parquet", "train"),
        ("data/test-00000-of-00001-9b2f3cc5a1d04e77.parquet", "test"),
        ("c4-validation.00000-of-00008.json.gz", "validation"),
        ("wiki.valid.tokens", "validation"),
        ("Dev.jsonl", "validation"),
        ("val/a.txt", "validation"),
        ("test/deep/a.txt", "test"),
        ("test/train.txt", "train"),
        ("test_data.jsonl", "test"),
        ("test_en.jsonl", "test"),
        ("training_set.csv", "train"),
        ("my_eval.json.zst", "test"),
        ("a.txt", None),
        ("test", "test"),
        ("1.txt", None),
        ("a test of patience.txt", None),
        ("test driven development.txt", None),
        ("testament.txt", None),
        ("retrain.txt", None),
        ("contest/a.txt", None),
    ],
)
def test_names_say_the_split(name, split):
    assert split_by_name(name) == split


def hub_clone(root):
    """A data set as `git clone` brings it from the Hugging Face hub."""
    (root / "data").mkdir(parents=True)
    for split, texts in (("train", ["train one", "train two"]), ("test", ["secret test"])):
        parquet.write_table(pa.table({"text": texts}), root / "data" / f"{split}-00000-of-00001.parquet")
    (root / "README.md").write_text("---\nlicense: mit\n---\n# Texts\n")
    (root / "dataset_infos.json").write_text('{"default": {"description": ""}}')
    (root / ".gitattributes").write_text("*.parquet filter=lfs")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("[core]")
    return root


def test_a_hub_clone_holds_its_test_split_out_and_its_card_is_no_text(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test").mkdir()  # is not what --held-out test means where the source has such a split
    root = hub_clone(tmp_path / "clone")
    code, shown, _ = prepare_command(capsys, root, tmp_path / "out")
    assert code == 0
    assert texts_of(tmp_path / "out") == {"train": [b"train one", b"train two"], "held_out": [b"secret test"]}
    lines = shown.splitlines()
    assert any(line.startswith("train: 1 file") and "data/train-00000-of-00001.parquet" in line for line in lines)
    assert any(line.startswith("test: 1 file") and line.endswith("held out") for line in lines)
    assert any(line.startswith("left out: 2 files") and "metadata: first README.md" in line for line in lines)
    parquet.write_table(pa.table({"text": ["a validation"]}), root / "data" / "validation-00000-of-00001.parquet")
    code, shown, _ = prepare_command(capsys, root, tmp_path / "both", "--strict")
    assert code == 0 and texts_of(tmp_path / "both")["held_out"] == [b"a validation"]
    assert "the test split: data/test-00000-of-00001.parquet: --held-out test takes it" in shown
    for number, chosen in enumerate(("test", str(root / "data" / "test-00000-of-00001.parquet"))):
        assert prepare_command(capsys, root, tmp_path / f"{number}", "--held-out", chosen)[0] == 0
        assert texts_of(tmp_path / f"{number}")["held_out"] == [b"secret test"]
    assert prepare_command(capsys, root, tmp_path / "share", "--held-out", "0.5")[0] == 0
    assert all_texts_of(tmp_path / "share") == [b"train one", b"train two"]


CARD = """---
configs:
- config_name: english
  data_files:
  - split: train
    path: texts/one*.jsonl
  - split: validation
    path: [texts/two.jsonl]
- config_name: german
  data_dir: de
  data_files: "*.txt"
---
"""


def carded(root):
    write_lines(root / "texts" / "one_a.jsonl", "one", "eins")
    write_lines(root / "texts" / "two.jsonl", "two")
    write_lines(root / "texts" / "test.jsonl", "no data")
    (root / "de").mkdir()
    for name in "ab":
        (root / "de" / f"{name}.txt").write_text(f"deutsch {name}")
    (root / "README.md").write_text(CARD)
    return root


def test_the_card_says_which_files_are_of_which_split(tmp_path, capsys):
    root = carded(tmp_path / "set")
    line = refused(capsys, root, tmp_path / "out")
    assert "README.md: choose with --config one of its configurations english, german" in line
    assert "config='french': is not among" in refused(capsys, root, tmp_path / "out", "--config", "french")
    code, shown, _ = prepare_command(capsys, root, tmp_path / "out", "--config", "english")
    assert code == 0 and texts_of(tmp_path / "out") == {"train": [b"eins", b"one"], "held_out": [b"two"]}
    assert "left out: 3 files" in shown and "not listed by README.md: first de/a.txt" in shown
    assert prepare_command(capsys, root, tmp_path / "german", "--config", "german")[0] == 0
    assert all_texts_of(tmp_path / "german") == [b"deutsch a", b"deutsch b"]
    (root / "texts" / "two.jsonl").unlink()
    line = refused(capsys, root, tmp_path / "x", "--config", "english")
    assert "lists 'texts/two.jsonl' for the split validation, and nothing here matches" in line
    options = ("--exclude", "README.md")
    assert prepare_command(capsys, root, tmp_path / "names", *options)[0] == 0
    assert texts_of(tmp_path / "names")["held_out"] == [b"no data"]  # texts/test.jsonl
    for head in ("configs: [{data_files: [{split: 3}]}]", "configs: [{data_files: [{split: a, path: ../[}]}]"):
        (root / "README.md").write_text(f"---\n{head}\n---\n")
        assert "README.md" in refused(capsys, root, tmp_path / "x")
    for head in ("configs: [", "configs: " + "[" * 500):
        (root / "README.md").write_text(f"---\n{head}\n---\n")
        assert "README.md: its head is not YAML" in refused(capsys, root, tmp_path / "x")
    (root / "README.md").write_text("no head at all")
    assert "lists no configurations" in refused(capsys, root, tmp_path / "x", "--config", "english")


def save_to_disk(folder, texts):
    """A folder as `datasets.Dataset.save_to_disk` leaves it, with a cache file beside it."""
    folder.mkdir(parents=True)
    for name, some in (("data-00000-of-00001", texts), ("cache-1f2e3d", ["cached"])):
        table = pa.table({"text": some})
        with pa.ipc.new_stream(str(folder / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table)
    files = [{"filename": "data-00000-of-00001.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "0", "_split": "train"}))
    (folder / "dataset_info.json").write_text('{"features": {"text": {"dtype": "string"}}}')


def test_folders_of_save_to_disk_are_read(tmp_path, capsys):
    save_to_disk(tmp_path / "one", ["a text", "another"])
    code, shown, _ = prepare_command(capsys, tmp_path / "one", tmp_path / "out")
    assert code == 0 and all_texts_of(tmp_path / "out") == [b"a text", b"another"]
    assert "not listed by the state.json beside it: cache-1f2e3d.arrow" in shown
    assert "left out: 2 files" in shown and "metadata: first dataset_info.json" in shown
    save_to_disk(tmp_path / "all" / "train", ["a text", "another"])
    save_to_disk(tmp_path / "all" / "test", ["secret"])
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert prepare_command(capsys, tmp_path / "all", tmp_path / "both")[0] == 0
    assert texts_of(tmp_path / "both") == {"train": [b"a text", b"another"], "held_out": [b"secret"]}
    (tmp_path / "one" / "data-00000-of-00001.arrow").unlink()
    line = refused(capsys, tmp_path / "one", tmp_path / "x")
    assert "state.json: lists data-00000-of-00001.arrow, which is not there" in line


def test_held_out_is_a_share_a_split_or_a_path(tmp_path, capsys):
    source = tmp_path / "in"
    write_lines(source / "a.jsonl", *(f"text {number}" for number in range(400)))
    assert prepare_command(capsys, source, tmp_path / "share", "--held-out", "0.25")[0] == 0
    assert 70 < len(texts_of(tmp_path / "share")["held_out"]) < 130
    write_lines(tmp_path / "other" / "b.jsonl", "elsewhere")
    for number, path in enumerate((tmp_path / "other", tmp_path / "other" / "b.jsonl")):
        code, shown, _ = prepare_command(capsys, source, tmp_path / f"{number}", "--held-out", path)
        assert code == 0 and texts_of(tmp_path / f"{number}")["held_out"] == [b"elsewhere"]
        assert len(texts_of(tmp_path / f"{number}")["train"]) == 400 and "; held out" in shown
    assert "lies in the source" in refused(capsys, source, tmp_path / "other" / "out", "--held-out", tmp_path / "other")
    for value, said in {
        "1.5": "a share must be above 0 and below 1",
        "nan": "a share must be above 0 and below 1",
        "0": "a share must be above 0",
        "nowhere": "is no share, no path, and no split of the source, which names none",
        str(tmp_path / "in"): "has no files to train on",
        "x" * 300: "File name too long",
    }.items():
        assert said in refused(capsys, source, tmp_path / "x", "--held-out", value)
    (source / "a.jsonl").rename(source / "test.jsonl")
    assert "has no files to train on" in refused(capsys, source, tmp_path / "x")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_share_of_one_text_is_its_end(tmp_path, capsys, suffix):
    import gzip

    lines = b"".join(b"line %d\n" % number for number in range(100))
    (tmp_path / f"a.txt{suffix}").write_bytes(gzip.compress(lines) if suffix else lines)
    source = tmp_path / f"a.txt{suffix}"
    assert prepare_command(capsys, source, tmp_path / "out", "--held-out", "0.5")[0] == 0
    found = texts_of(tmp_path / "out")
    assert found["train"][0] + found["held_out"][0] == lines and 40 < found["train"][0].count(b"\n") < 60
