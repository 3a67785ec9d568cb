"""`main.py generate` on a run of two steps."""

import json
import os
import resource

import jax
import pytest

from recollect.configuration import apply_overrides
from recollect.data.tokenizers import ByteTokenizer
from recollect.experiments.registry import load
from recollect.models import FunctionalModel, Sampling, continue_texts
from tests.test_bad_input import command, refused, runs  # noqa: F401 - a fixture
from tests.test_docs import code_of


def printed(capsys, *arguments):
    capsys.readouterr()
    assert command(["generate", *arguments]) == 0
    return capsys.readouterr().out


def test_prompts_of_a_file_in_one_batch(capsys, runs, tmp_path):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("def f(x):\n\nreturn\n \n", encoding="utf-8")
    both = ["--prompts", tmp_path / "prompts.txt", "--tokens", 20, "--seed", 4]
    rows = [json.loads(line) for line in printed(capsys, runs / "text", *both, "--logprobs").splitlines()]
    assert [row["prompt"] for row in rows] == ["def f(x):", "return"]
    assert all(len(row["tokens"]) == len(row["logprobs"]) <= 20 and max(row["logprobs"]) < 0 for row in rows)
    expected = "\n\n".join(row["prompt"] + row["text"] for row in rows) + "\n"
    assert printed(capsys, runs / "text", *both) == expected
    alone = printed(capsys, runs / "text", "--prompt", "return", "--tokens", 20, "--seed", 4)
    assert alone == rows[1]["prompt"] + rows[1]["text"] + "\n"


def test_prompts_given_one_by_one_are_those_of_a_file(capsys, runs, tmp_path):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("a = 1\nb\n", encoding="utf-8")
    some = ["--tokens", 8, "--seed", 4]
    each = printed(capsys, runs / "text", "--prompt", "a = 1", "--prompt", "b", *some)
    assert each == printed(capsys, runs / "text", "--prompts", tmp_path / "prompts.txt", *some)
    assert printed(capsys, runs / "text", *some).startswith("def ")


def test_a_step_of_a_run(capsys, runs):  # noqa: F811
    some = ["--prompt", "a", "--tokens", 8]
    assert printed(capsys, f"{runs / 'text'}:2", *some) == printed(capsys, runs / "text", *some)
    said = f"{runs / 'text'} has no checkpoint of step 1; there are 2"
    assert said in refused(capsys, ["generate", f"{runs / 'text'}:1", *some])


def test_a_stop_string(capsys, runs):  # noqa: F811
    asked = [runs / "text", "--prompt", "x", "--tokens", 30, "--seed", 1, "--top-k", 40, "--min-p", 0.001]
    (free,) = map(json.loads, printed(capsys, *asked, "--logprobs").splitlines())
    stop = free["text"][3:5]
    (row,) = map(json.loads, printed(capsys, *asked, "--logprobs", "--stop", stop).splitlines())
    assert row["finish"] == "stop" and row["text"] == free["text"][: free["text"].index(stop)]


def test_a_prompts_file_that_cannot_be(capsys, runs, tmp_path):  # noqa: F811
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "holds no prompt" in refused(capsys, ["generate", runs / "text", "--prompts", tmp_path / "empty"])
    assert "is not UTF-8" in refused(capsys, ["generate", runs / "text", "--prompts", tmp_path / "binary"])
    assert "nothing.txt" in refused(capsys, ["generate", runs / "text", "--prompts", tmp_path / "nothing.txt"])


class Endless(ByteTokenizer):
    """Bytes whose documents never end."""

    start = -2

    def encode(self, text):
        return ByteTokenizer().encode(text)


def test_the_workflow_pages_code(capsys, runs):  # noqa: F811
    (code,) = code_of("generate.md")
    exec(code.replace("runs/text.based", str(runs / "text")), {})
    assert {line[0] for line in capsys.readouterr().out.splitlines()} == {"0", "1"}


@pytest.mark.slow
def test_a_long_stream_takes_constant_memory():
    """Tokens streamed through a small `text.based`, in constant memory; STREAM=1000000 takes more of them."""
    length = int(os.environ.get("STREAM", 100_000))
    size = "model.width=32 ...heads=2 model.mlp.hidden=32 ...feature_dim=4 ...window=16"
    model = FunctionalModel(apply_overrides(load("text.based", "experiment"), size.split()).model, 257)
    params, tokens, peaks = model.init(jax.random.key(0)), 0, []
    for part in continue_texts(model, params, Endless(), ["def "], length, Sampling(seed=0)):
        tokens += len(part.tokens)
        if tokens // (length // 10) > len(peaks):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            print(f"{tokens:,} tokens: {peaks[-1]:,.0f} MiB")
    assert tokens == length and len(peaks) == 10 and peaks[-1] - peaks[0] < 16
