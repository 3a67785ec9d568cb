"""`main.py bench kernels`: checks before it times, says what is wrong, writes what it printed."""

from __future__ import annotations

import dataclasses
import functools
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
    wrong = dataclasses.replace(case, plain={"off by a thousandth": lambda x: case.run(x, "xla") * 1.001})
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


def test_libraries_are_asked_where_an_operation_has_them():
    everything = ["pallas_gpu", "cudnn", "splash", "jla", "xla"]
    recurrence = kernel_cases.CASES["linear_recurrence", "no decay"](**SMALL)
    causal = kernel_cases.CASES["window_attention", "causal"](**SMALL)
    assert [name for name, _ in kernels._forms(recurrence, everything)] == ["pallas_gpu", "jla", "xla", "square form"]
    assert [name for name, _ in kernels._forms(causal, everything)] == [
        "pallas_gpu",
        "cudnn",
        "splash",
        "xla",
        "softmax over all pairs",
        "jax.nn",
    ]


SOFTMAX = [
    ("window_attention", "causal", {}, "jax.nn"),
    ("window_attention", "window", {"w": 10}, "jax.nn"),
    ("window_attention", "window, sinks", {"w": 10, "g": 1}, "softmax over all pairs"),
    ("landmark_attention", "grouped softmax", {"block": 7}, "softmax over all pairs"),
    ("head_mixture_attention", "routed heads", {"h": 4, "a": 3}, "all heads, xla"),
]


@pytest.mark.parametrize(("operation", "variant", "more", "form"), SOFTMAX, ids=[f"{case[0]}, {case[1]}" for case in SOFTMAX])
def test_plain_forms_of_softmax_attention_compute_the_same(operation, variant, more, form):
    case = kernel_cases.CASES[operation, variant](**{**SMALL, "t": 45, **more})
    errors = kernels._errors(case, form, jnp.float32)
    assert set(errors) == {"output", *case.inputs(jax.random.key(0), jnp.float32)}
    assert all(error < 1e-5 for error, _ in errors.values()), errors


def test_work_of_softmax_attention_is_that_of_the_pairs_seen():
    t, sizes = 45, {"b": 3, "h": 2, "k": 8, "v": 5}
    make = {key: functools.partial(case, t=t, **sizes) for key, case in kernel_cases.CASES.items()}
    causal, windowed = ([(i, j) for i in range(t) for j in range(t) if j <= i and i - j < w] for w in (t, 10))
    assert make["window_attention", "causal"]().work == 2 * 3 * 2 * len(causal) * (8 + 5)
    assert make["window_attention", "window"](w=10).work == 2 * 3 * 2 * len(windowed) * (8 + 5)
    assert make["head_mixture_attention", "routed heads"](a=1).work == 2 * 3 * 1 * len(causal) * (8 + 5)
    # Landmarks stand at 7, 15, ...: a query reads its own block's ordinary tokens, and all keys of earlier blocks but the landmarks' values.
    earlier = [(i, j) for i, j in causal if j // 8 < i // 8]
    own = [(i, j) for i, j in causal if j // 8 == i // 8 and j % 8 != 7]
    valued = [(i, j) for i, j in earlier if j % 8 != 7]
    expected = 2 * 3 * 2 * ((len(own) + len(earlier)) * 8 + (len(own) + len(valued)) * 5)
    assert make["landmark_attention", "grouped softmax"](block=7).work == expected


def test_gradients_are_checked_at_sizes_that_keep_the_case():
    """The window is still shorter than the sequence, query heads still share key heads, and as large a share of the heads is active."""
    for platform in ("cpu", "gpu"):
        for case in kernel_cases.cases(platform, ["window_attention", "landmark_attention", "head_mixture_attention"]):
            small = kernel_cases.smaller(case).sizes
            assert small["b"] == 1 and small["t"] == min(320, case.sizes["t"]) and small["h"] <= 4 and small["k"] == case.sizes["k"]
            if "w" in small:
                assert small["w"] < small["t"] / 2
            for name in {"g", "a"} & small.keys():
                assert small[name] / small["h"] == case.sizes[name] / case.sizes["h"]


def test_work_of_a_window_grows_with_length_and_window():
    """As the compiler counts it for the xla form, backward included; causal attention's grows with the square."""

    def counted(variant, t, **sizes):
        case = kernel_cases.CASES["window_attention", variant](b=1, t=t, h=1, k=8, v=8, **sizes)
        inputs = {name: jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32) for name in ("q", "k", "v")}
        function = jax.jit(kernels._gradient(lambda x: case.run(x, "xla")))
        return function.lower(inputs).compile().cost_analysis()["flops"]

    base = counted("window", 512, w=64)
    assert 1.9 < counted("window", 1024, w=64) / base < 2.1
    assert 1.8 < counted("window", 512, w=128) / base < 2.2
    assert 3.5 < counted("causal", 1024) / counted("causal", 512) < 4.1


def test_times_are_those_of_a_call(monkeypatch):
    monkeypatch.setattr(kernels, "TURNS", 3)
    x = jnp.ones((256, 256))
    few, many = (kernels.timed(lambda x, n=n: jax.lax.fori_loop(0, n, lambda _, y: y @ x / 256, x), x) for n in (1, 100))
    assert 0 < few < many


def test_lengths_grow_and_are_measured(small, capsys):
    assert kernels.main(["--lengths", "--longest", "2048", "--operations", "taylor_attention"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("taylor_attention")]
    assert len(lines) == 2 and lines[0].split()[2] == "1,024" and lines[1].split()[2] == "2,048"


def test_lengths_stop_where_a_call_takes_long(small, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "timed", lambda function, inputs: 3.0)
    assert kernels.main(["--lengths", "--longest", "4096", "--operations", "taylor_attention"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("taylor_attention")]
    assert len(lines) == 2 and "2,048 not timed, as 1,024 tokens take more than 2 s" in lines[1]


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
