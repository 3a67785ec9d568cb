"""`main.py bench kernels`: checks before it times, says what is wrong, writes what it printed."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import kernel_cases, kernels
from configuration import UserError

SMALL = {"b": 1, "t": 48, "h": 2, "k": 8, "v": 8}


@pytest.fixture
def small(monkeypatch):
    shapes = {
        "linear_recurrence": [SMALL],
        "taylor_attention": [SMALL],
        "short_convolution": [{"b": 1, "t": 48, "d": 8}],
        "long_convolution": [{"b": 1, "t": 48, "d": 8}],
    }
    monkeypatch.setattr(kernel_cases, "CPU_SHAPES", shapes)
    # A variant that has everything, and an operation of another shape: the others are held to the reference elsewhere.
    few = (
        ("linear_recurrence", "gated delta, decay a head"),
        ("short_convolution", "4 taps, silu, gate"),
        ("taylor_attention", "normalised"),
    )
    monkeypatch.setattr(kernel_cases, "CASES", {key: kernel_cases.CASES[key] for key in few})
    monkeypatch.setattr(kernels, "timed", lambda function, inputs: 0.002)


def test_results_are_checked_printed_and_written(small, tmp_path, capsys):
    assert (
        kernels.main(["--operations", "linear_recurrence", "short_convolution", "--backends", "pallas_tpu", "xla", "--out", str(tmp_path)])
        == 0
    )
    (path,) = tmp_path.glob("*/kernels.json")
    written = json.loads(path.read_text())
    rows = written["rows"]
    assert {row["variant"] for row in rows} == {"gated delta, decay a head", "4 taps, silu, gate"}
    for row in rows:
        if row["form"] == "pallas_tpu":
            assert "it runs on TPUs; this is cpu" in row["refused"]
        else:
            assert row["forward"] == row["both"] == 0.002 and not row["wrong"]
            assert max(error for error, _ in row["errors"].values()) < 1e-5
    printed = capsys.readouterr().out
    assert "2.000      -      -" in printed and "it runs on TPUs; this is cpu" in printed


def test_a_wrong_form_is_reported_and_not_timed(monkeypatch, capsys):
    case = kernel_cases.CASES["linear_recurrence", "no decay"](**SMALL)
    monkeypatch.setattr(kernel_cases, "CPU_SHAPES", {"linear_recurrence": [SMALL]})
    wrong = dataclasses.replace(case, plain=lambda x: case.run(x, "xla") * 1.001, plain_name="off by a thousandth")
    monkeypatch.setattr(kernel_cases, "CASES", {("linear_recurrence", "no decay"): lambda **sizes: wrong})
    assert kernels.main(["--operations", "linear_recurrence", "--backends", "xla"]) == 1
    assert "WRONG: output" in capsys.readouterr().out


def test_floors_come_from_the_arrays():
    case = kernel_cases.CASES["linear_recurrence", "no decay"](b=2, t=4096, h=16, k=128, v=128)
    inputs = {name: jax.ShapeDtypeStruct((2, 4096, 16, 128), jnp.bfloat16) for name in ("q", "k", "v")}
    inputs = {name: jnp.zeros(x.shape, x.dtype) for name, x in inputs.items()}
    floors = kernels._floors(case, inputs, "NVIDIA H100 80GB HBM3")
    tensor = 2 * 4096 * 16 * 128 * 2
    assert floors == {"forward": pytest.approx(4 * tensor / 3.35e12), "both": pytest.approx(11 * tensor / 3.35e12)}
    assert kernels._floors(case, inputs, "cpu") is None


def test_times_are_those_of_a_call(monkeypatch):
    monkeypatch.setattr(kernels, "TURNS", 3)
    x = jnp.ones((256, 256))
    few, many = (kernels.timed(lambda x, n=n: jax.lax.fori_loop(0, n, lambda _, y: y @ x / 256, x), x) for n in (1, 100))
    assert 0 < few < many


def test_lengths_grow_and_are_measured(small, capsys):
    assert kernels.main(["--lengths", "--longest", "2048", "--operations", "taylor_attention"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("taylor_attention")]
    assert len(lines) == 2 and lines[0].split()[2] == "1,024" and lines[1].split()[2] == "2,048"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operations", "matmul"], "no operation 'matmul'"),
        (["--backends", "cuda"], "no backend 'cuda'"),
        (["--colour"], "unrecognized arguments"),
        (["--operations", "taylor_attention", "--peer-python", "/no/python"], "does not run"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        kernels.main(arguments)
