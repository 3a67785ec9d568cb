"""The generation benchmark at tiny sizes: whole runs of it, the numbers it makes of what it measured, its one second
try, and what it refuses."""

import json
import stat

import chz
import jax
import pytest

from recollect.benchmarks import generation, generation_cell
from recollect.configuration import UserError
from recollect.experiments.pretrain import variant
from recollect.layers import Attention, LinearAttention, SlidingWindow
from recollect.layers.modules import Rotary, SwiGLU, Taylor
from recollect.models import repeat, state_bytes


@pytest.fixture(scope="module")
def tiny():
    def of(name, kind="experiment"):
        full = Attention(heads=2)
        based = (LinearAttention(heads=2, feature_dim=4, feature_map=Taylor()), SlidingWindow(heads=2, window=8))
        stages = repeat(full, depth=1) if "attention" in name else repeat(*based, depth=2)
        published = variant("attention_30m")
        return chz.replace(published, model=chz.replace(published.model, width=16, stages=stages, mlp=None))

    return of


def test_a_whole_run(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("recollect.experiments.registry.load", tiny)
    arguments = ["--models", "based_30m", "attention_30m", "--lengths", "48", "--batches", "3", "--pieces", "1"]
    assert generation.main([*arguments, "--prefill-rows", "2", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("cpu-*/generation.json")
    result = json.loads(file.read_text())
    assert file.with_suffix(".png").exists() and "unfinished" not in result
    based, attention = result["rows"]
    # One layer keeps a key and a value per token; 12 bytes per slot and cursors are small beside it.
    assert 3 * 48 * 2 * 16 * 4 < attention["state_bytes"] < 3 * 48 * (2 * 16 * 4 + 16)
    assert (based["rows"], based["prefill_rows"], based["attention"]) == (3, 2, False)
    for row in (based, attention):
        assert row["decode_tokens_per_second"] == pytest.approx(3 / row["step_seconds"])
        assert (
            row["prefill_tokens_per_second"] > 0
            and len(row["seconds"]) == 2
            and row["step_seconds"] == row["seconds"][1]
        )
    times = based["decode_tokens_per_second"] / attention["decode_tokens_per_second"]
    assert result["ratios"] == [
        f"based_30m decodes {times:.2f} times as many tokens per second as attention_30m at 48 tokens (3 rows and 3)"
    ]
    assert result["ratios"][0] in capsys.readouterr().out


def test_the_largest_batch_is_tried_with_fewer_rows_once(tiny, monkeypatch):
    class Memory:
        device_kind = "NVIDIA H100 80GB HBM3"

        def memory_stats(self):
            return {"bytes_limit": 10_000_000, "bytes_in_use": 1_000_000}

    subject = generation.Subject("attention", tiny("attention").model, 20)
    monkeypatch.setattr(jax, "devices", lambda: [Memory()])
    cell = generation.Cell(subject, 48, "largest", 1, 2)
    row = state_bytes(subject.state(1, 48)) + 12 * 20
    free, most = 9_000_000 - state_bytes(subject.shapes), cell.row["rows"]
    assert most % 8 == 0 and 0.8 * free < most * row < 0.9 * free
    subject.params, tried = {}, []

    def out_of_memory():
        tried.append(cell.row["rows"])
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(cell, "compile", lambda what: cell.compiled.setdefault(what, None))
    monkeypatch.setattr(cell, "_decode", out_of_memory)
    cell.measure("decode")
    assert tried == [most, generation_cell.in_eights(most * 3 // 4)]
    assert cell.row["attempts"] == 2 and "RESOURCE_EXHAUSTED" in cell.row["decode_error"]


def test_the_peer_gets_the_exported_model(tiny, tmp_path):
    interpreter = tmp_path / "python"
    interpreter.write_text(
        f'#!/bin/sh\nread case\necho "$case" > {tmp_path}/case.json\n'
        f'cp -r "$(echo "$case" | sed \'s/.*folder": "\\([^"]*\\).*/\\1/\')" {tmp_path}/exported\n'
        "echo 'RESULT {\"decode_tokens_per_second\": 2}'\n"
    )
    interpreter.chmod(interpreter.stat().st_mode | stat.S_IXUSR)
    llama = chz.replace(
        tiny("attention").model, mlp=SwiGLU(hidden=16), stages=repeat(Attention(heads=2, positions=Rotary()), depth=1)
    )
    cell = generation.Cell(generation.Subject("attention", llama, 20), 48, "3", 1, 2)
    assert generation.peer(cell, str(interpreter)) == {"decode_tokens_per_second": 2}
    case = json.loads((tmp_path / "case.json").read_text())
    assert (case["rows"], case["prompt"], case["piece"], case["pieces"]) == (3, 48 - 32, 16, 1)
    assert (tmp_path / "exported" / "model.safetensors").exists()
    other = generation.Cell(generation.Subject("based", tiny("based").model, 20), 48, "3", 1, 2)
    assert "error" in generation.peer(other, str(interpreter))


def test_mixers_by_name_and_those_that_do_not_stream():
    options = generation._subjects  # generator: models are made one after another
    named = type("Options", (), {"models": None, "mixers": ["all"], "vocabulary": 7})
    names = [name for name, _, vocabulary in options(named) if vocabulary == 7]
    assert {"Attention", "LinearAttention", "Hyena", "Mamba2"} <= set(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "largest"], "only accelerators"),
        (["--batches", "0"], "--batches 0: must be positive"),
        (["--lengths", "32", "--pieces", "1"], "--lengths 32: at least 33"),
        (["--mixers", "Atention"], "no mixer 'Atention'"),
        (["--pieces", "0"], "--pieces 0: must be positive"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        generation.main(arguments)
