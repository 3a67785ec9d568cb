"""Preparing: same bytes whatever happens on the way, damage is found and mended, and the result reads as TFDS data
and by pieces."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from recollect.configuration import UserError
from recollect.data.text.preparation import reader as reading
from recollect.data.text.preparation.manifest import MANIFEST, PLAN, read_manifest
from recollect.data.text.preparation.reader import open_prepared
from recollect.data.text.preparation.shards import RECORD, dtype_for
from recollect.data.tokenizers import START
from tests.data.text.preparation.prepared_folders import assert_same, files, prepared, texts

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_documents_come_back(folder, tmp_path, tokenizer):
    manifest = prepared(folder, tmp_path / "out", tokenizer, shard_bytes=5000)
    opened = open_prepared(str(tmp_path / "out"))
    expected = sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert sorted(texts(opened.train) + texts(opened.held_out)) == expected and len(opened.held_out) >= 1
    for split, part in (("train", opened.train), ("held_out", opened.held_out)):
        assert part.byte_lengths.tolist() == [len(text) for text in texts(part)] and part.lengths.dtype == np.int64
        assert part.lengths.tolist() == [len(opened.tokenizer.encode(text)) for text in texts(part)]
        assert all(
            part.tokens(number).tolist() == opened.tokenizer.encode(text).tolist()
            for number, text in enumerate(texts(part))
        )
        assert (
            manifest["splits"][split]["tokens"] == part.lengths.sum() and len(manifest["splits"][split]["shards"]) > 3
        )
    facts = json.loads(json.dumps(opened.describe()))
    assert facts["tokenizer"] == tokenizer and facts["train"]["bytes"] + facts["held_out"]["bytes"] == sum(
        map(len, expected)
    )


def test_pieces_of_long_documents_read_little(tmp_path, monkeypatch):
    """Documents of several records, and one that tasks cut in the middle."""
    random_bytes = np.random.default_rng(0)
    root = tmp_path / "long"
    root.mkdir()
    raw = {}
    for name, size in (("a", 3 * RECORD + 17), ("b", RECORD - 1), ("c", RECORD), ("d", 5), ("e", 9 * RECORD)):
        raw[name] = random_bytes.integers(97, 122, size, np.uint8).tobytes().replace(b"m", b"\n")
        (root / f"{name}.txt").write_bytes(raw[name])
    prepared(root, tmp_path / "out", shard_bytes=4 * RECORD + 33)
    opened = open_prepared(str(tmp_path / "out"))
    by_text = {
        bytes(text): (part, number)
        for part in (opened.train, opened.held_out)
        for number, text in enumerate(texts(part))
    }
    assert set(by_text) == set(raw.values())
    records = tfds.builder_from_directory(tmp_path / "out").as_data_source(split="train")
    assert max(len(record["tokens"]) for record in records) == RECORD
    monkeypatch.setattr(reading, "KEPT_BYTES", 0)
    opened = open_prepared(str(tmp_path / "out"))
    for text, (_, number) in by_text.items():
        part = next(
            part for part in (opened.train, opened.held_out) if number < len(part) and part.text(number) == text
        )
        whole = np.array([START, *text], np.int32)
        reads = []
        record = part._source.__class__.__getitem__
        monkeypatch.setattr(
            part._source.__class__,
            "__getitem__",
            lambda self, key, record=record, reads=reads: (reads.append(key), record(self, key))[1],
        )
        for start in [0, 1, RECORD - 3, RECORD, len(whole) - 40, *np.random.default_rng(1).integers(0, len(whole), 10)]:
            start = max(int(start), 0)
            reads.clear()
            piece = part.tokens(number, start, start + 50)
            assert piece.dtype == np.int32 and piece.tolist() == whole[start : start + 50].tolist()
            assert len(reads) <= 3
        monkeypatch.undo()
        monkeypatch.setattr(reading, "KEPT_BYTES", 0)
    assert opened.train.tokens(0, 3, 3).tolist() == opened.train.tokens(0, 10**9, 10**9 + 1).tolist() == []
    with pytest.raises(IndexError, match="document 9 of"):
        opened.train.tokens(9)


def test_tokens_are_stored_in_two_bytes_where_they_fit(folder, tmp_path):
    assert dtype_for(257) == dtype_for(1 << 16) == np.uint16 and dtype_for((1 << 16) + 1) == np.int32
    tokenizer = tmp_path / "tokenizer.json"
    pieces = {"<s>": 0, "<unk>": 1} | {f"w{number}": number for number in range(2, 70_000)}
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<s>", "<unk>"])
    words.save(str(tokenizer))
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"w{number} w{69_999 - number}"}) + "\n" for number in range(2, 40))
    )
    prepared(tmp_path / "a.jsonl", tmp_path / "large", str(tokenizer))
    prepared(folder, tmp_path / "small")
    for name, dtype in (("large", np.int32), ("small", np.uint16)):
        builder = tfds.builder_from_directory(tmp_path / name)
        record = builder.as_data_source(split="train")[0]
        assert record["tokens"].dtype == dtype and isinstance(record["name"], bytes)
        assert set(builder.info.splits) == {"train", "held_out"} and builder.info.splits["train"].num_examples > 10
    opened = open_prepared(str(tmp_path / "large"))
    assert opened.train.tokens(0).max() > 1 << 16 and opened.tokenizer.vocabulary == 70_000


def test_any_number_of_processes_writes_the_same_bytes(folder, tmp_path):
    one = prepared(folder, tmp_path / "one", "bpe:280", shard_bytes=4000)
    three = prepared(folder, tmp_path / "three", "bpe:280", processes=3, shard_bytes=4000)
    assert one == three
    assert_same(tmp_path / "one", tmp_path / "three")


def command(folder, out, *options):
    return [sys.executable, "main.py", "prepare", str(folder), str(out), "--shard-mib", "0.002", *options]


@pytest.mark.parametrize("processes", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(folder, tmp_path, processes):
    options = ("--tokenizer", "bpe:290", "--processes", processes)
    prepared(folder, tmp_path / "whole", "bpe:290", shard_bytes=int(0.002 * 2**20))
    tasks = len(read_manifest(tmp_path / "whole")["splits"]["train"]["shards"])
    moments = random.Random(int(processes))
    out, done = tmp_path / "out", 0
    for upto in (0, tasks // 3, 2 * tasks // 3):
        child = subprocess.Popen(
            command(folder, out, *options), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while not (out / PLAN).exists() or len(list((out / "parts").glob("0*.json"))) < upto:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert len(list((out / "parts").glob("0*.json"))) >= done
        done = len(list((out / "parts").glob("0*.json")))
        if not (out / MANIFEST).exists():
            with pytest.raises(UserError, match="its preparation was not finished"):
                open_prepared(str(out))
    assert done >= 2 * tasks // 3
    subprocess.run(command(folder, out, *options), cwd=ROOT, check=True, capture_output=True)
    assert_same(tmp_path / "whole", out)


def test_stopped_after_every_file_that_is_written(folder, tmp_path, monkeypatch):
    """As if killed before each of the renames in turn: the next call goes on, and loses no task that was done."""
    prepared(folder, tmp_path / "whole", "bpe:270", shard_bytes=8000)
    real, left = os.replace, [0]

    class Killed(BaseException):
        """What no handler takes for an error."""

    def replace(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        real(source, target)

    out, moments = tmp_path / "out", 0
    while not (out / MANIFEST).exists():
        done = {path: path.stat().st_mtime_ns for path in (out / "parts").glob("0*.json")}
        left[0], moments = moments, moments + 1
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(os, "replace", replace)
            prepared(folder, out, "bpe:270", shard_bytes=8000)
        assert all(path.stat().st_mtime_ns == moment for path, moment in done.items())
    assert moments > 5
    assert_same(tmp_path / "whole", out)


def test_a_full_disk_is_told_and_the_rest_is_done_later(folder, tmp_path):
    """Files of over 100 KiB can't be written, as with a quota or a full disk; then they can."""
    prepared(folder, tmp_path / "whole", shard_bytes=int(0.002 * 2**20))
    limited = "ulimit -f 100; trap '' XFSZ; exec \"$@\""
    call = ["bash", "-c", limited, "bash", *command(folder, tmp_path / "out", "--processes", "1")]
    done = subprocess.run(
        call, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    )
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and "File too large" in done.stderr.splitlines()[0]
    ), done.stderr
    with pytest.raises(UserError, match="its preparation was not finished"):
        open_prepared(str(tmp_path / "out"))
    prepared(folder, tmp_path / "out", shard_bytes=int(0.002 * 2**20))
    assert_same(tmp_path / "whole", tmp_path / "out")


def shard_of(folder, split="train"):
    return folder / read_manifest(folder)["splits"][split]["shards"][0]["file"]


DAMAGE = {
    "shard flipped": (lambda folder: shard_of(folder), "flip"),
    "shard cut": (lambda folder: shard_of(folder, "held_out"), "cut"),
    "shard missing": (lambda folder: shard_of(folder), "remove"),
    "lengths flipped": (lambda folder: folder / "train-documents.npy", "flip"),
    "records missing": (lambda folder: folder / "held_out-records.npy", "remove"),
    "manifest flipped": (lambda folder: folder / MANIFEST, "flip"),
    "tokenizer flipped": (lambda folder: folder / "tokenizer.json", "flip"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_mended(folder, tmp_path, case):
    out = tmp_path / "out"
    prepared(folder, out, "bpe:260", shard_bytes=8000)
    shutil.copytree(out, tmp_path / "whole")
    find, how = DAMAGE[case]
    path = find(out)
    raw = path.read_bytes()
    if how == "remove":
        path.unlink()
    else:
        middle = raw.index(b'"vocab"') + 20 if path.name == "tokenizer.json" else len(raw) // 2
        path.write_bytes(raw[:middle] if how == "cut" else raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :])
    with pytest.raises(UserError, match=f"{path.name}.*(not as it was written|is no tokenizer)"):
        open_prepared(str(out))
    prepared(folder, out, "bpe:260", shard_bytes=8000)
    assert_same(out, tmp_path / "whole")


def test_large_folders_tell_of_damage_when_it_is_read(folder, tmp_path, monkeypatch):
    prepared(folder, tmp_path / "out")
    monkeypatch.setattr(reading, "CHECKED_BYTES", 0)
    path = shard_of(tmp_path / "out")
    raw = bytearray(path.read_bytes())
    for at in range(300, 20_000):
        raw[at] ^= 255
    path.write_bytes(raw)
    opened = open_prepared(str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"record \d+ cannot be read"):
        texts(opened.train)


def test_folders_of_something_else_are_refused(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds thesis\.tex and is no prepared text"):
        prepared(folder, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    with pytest.raises(UserError, match="lies in the source"):
        prepared(folder, folder / "inner" / "out")
    prepared(folder, folder / ".hidden" / "out")
    out = tmp_path / "out"
    prepared(folder, out)
    with pytest.raises(UserError, match="was prepared from something else"):
        prepared(folder, out, "bpe:300")
    (folder / "new.txt").write_text("changed")
    with pytest.raises(UserError, match="was prepared from something else"):
        prepared(folder, out)
    with pytest.raises(UserError, match="processes=0"):
        prepared(folder, tmp_path / "other", processes=0)
    with pytest.raises(UserError, match="a BPE that is trained here has its own"):
        prepared(folder, tmp_path / "other", "bpe:300", start="<s>")
    with pytest.raises(UserError, match="cannot write to"):
        prepared(folder, tmp_path / "mine" / "thesis.tex" / "out")
    (out / PLAN).write_text("{")
    with pytest.raises(UserError, match=r"plan\.json: is not as it was written; remove"):
        prepared(folder, out)


def test_a_prepared_folder_brings_its_tokenizer(folder, tmp_path):
    out = tmp_path / "out"
    prepared(folder, out, "bpe:300")
    same = open_prepared(str(out), str(out / "tokenizer.json"))
    assert same.digest == open_prepared(str(out), "bpe:300").digest == open_prepared(str(out)).digest
    with pytest.raises(UserError, match=r"tokenizer='bytes': .*was prepared with 'bpe:300'"):
        open_prepared(str(out), "bytes")
    again = open_prepared(str(folder), str(out / "tokenizer.json"))
    assert again.tokenizer.digest == same.tokenizer.digest and again.folder != same.folder
    assert texts(again.train) == texts(same.train)


def test_the_cache_follows_the_source(folder, cache):
    first = open_prepared(str(folder))
    stamp = (first.folder / MANIFEST).stat().st_mtime_ns
    again = open_prepared(str(folder), "bytes")
    assert (
        again.folder == first.folder
        and again.digest == first.digest
        and (first.folder / MANIFEST).stat().st_mtime_ns == stamp
    )
    (folder / "new.txt").write_text("something new")
    assert open_prepared(str(folder)).digest != first.digest
    shutil.move(folder, folder.with_name("moved"))
    (folder.with_name("moved") / "new.txt").unlink()
    assert open_prepared(str(folder.with_name("moved"))).folder == first.folder
    assert {path.parent for path in cache.rglob(MANIFEST)} == set((cache / "prepared").iterdir())


def _open_and_report(folder, cache, queue):
    os.environ["RECOLLECT_CACHE"] = cache
    queue.put(open_prepared(folder).digest)


def test_two_processes_may_prepare_at_once(folder, cache):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_open_and_report, args=(str(folder), str(cache), queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    digests = {queue.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    opened = open_prepared(str(folder))
    assert digests == {opened.digest} and list((cache / "prepared").iterdir()) == [opened.folder]
    assert not [name for name in files(opened.folder) if "writing" in name]


def test_neither_tensorflow_nor_jax_is_imported(tmp_path, folder):
    """A TensorFlow and a JAX that leave marks when imported stand first on the path, of workers too."""
    for name in ("tensorflow", "jax"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"open({str(tmp_path / f'imported-{name}')!r}, 'w').close()\n")
    program = (
        "from pathlib import Path\n"
        "from recollect.data.text.preparation.prepare import Preparation\n"
        "from recollect.data.text.preparation.reader import open_prepared\n"
        "if __name__ == '__main__':\n"
        f"    out = Path({str(tmp_path / 'out')!r})\n"
        f"    Preparation({str(folder)!r}, shard_bytes=9000).into(out, 2)\n"
        "    print(open_prepared(str(out)).train.tokens(0, 0, 5))\n"
    )
    (tmp_path / "program.py").write_text(program)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (
        not list(tmp_path.glob("imported-*"))
        and "Unknown size" not in done.stdout
        and "tokens per second" in done.stdout
    )


def test_the_command_prints_counts_and_mistakes(folder, tmp_path, capsys):
    from recollect.main import main

    out = tmp_path / "out"
    assert main(["prepare", str(folder), str(out), "--tokenizer", "bpe:50000", "--processes", "1"]) == 0
    shown = capsys.readouterr().out
    manifest = read_manifest(out)
    assert f"train: {manifest['splits']['train']['tokens']:,} tokens" in shown and "tokens per second" in shown
    assert f"the text has pairs for {manifest['tokenizer']['vocabulary']:,} tokens only" in shown
    assert main(["prepare", str(folder), str(out), "--tokenizer", "bpe:50000", "--processes", "1"]) == 0
    assert "their files as they were written" in capsys.readouterr().out
    assert main(["prepare", str(folder / "none"), str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: source=")


def test_standard_library_in_the_cache():
    opened = open_prepared("stdlib")
    assert opened.train.lengths.sum() + opened.held_out.lengths.sum() > 8e6
    assert (
        opened.tokenizer.name == "bytes"
        and opened.train.text(3) == opened.tokenizer.decode(opened.train.tokens(3)).encode()
    )
