"""`main.py bench kernels`: checks before it times, says what is wrong, writes what it printed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import signal
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import pytest

from recollect.benchmarks import kernel_case, kernel_cases, kernel_peers, kernels, peer_side, timing
from recollect.configuration import UserError
from recollect.pallas_kernels import dispatch
from tests.pallas_kernels.programs import benchmark

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
        ("linear_recurrence", "gated delta, decay per head"),
        ("short_convolution", "4 taps, silu, gate"),
        ("taylor_attention", "normalised"),
    )
    monkeypatch.setattr(kernel_cases, "CASES", {key: kernel_cases.CASES[key] for key in few})
    monkeypatch.setattr(timing, "timed", lambda run, *arguments: (0.002, 0.0))


@pytest.fixture
def only(monkeypatch):
    """Makes one small recurrence the only case, with these plain forms beside it."""

    def set_case(**plain):
        case = dataclasses.replace(kernel_cases.CASES["linear_recurrence", "no decay"](**SMALL), plain=plain)
        monkeypatch.setattr(kernel_cases, "CPU_SHAPES", {"linear_recurrence": [SMALL]})
        monkeypatch.setattr(kernel_cases, "CASES", {("linear_recurrence", "no decay"): lambda **sizes: case})
        monkeypatch.setattr(timing, "timed", lambda run, *arguments: (0.002, 0.0))
        return case

    return set_case


def results(folder):
    (path,) = folder.glob("*/kernels.json")
    return json.loads(path.read_text())


def test_results_are_checked_printed_and_written(small, tmp_path, capsys):
    arguments = ["--operations", "linear_recurrence", "short_convolution", "--backends", "pallas_tpu", "xla"]
    assert kernels.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = results(tmp_path)["rows"]
    assert "unfinished" not in results(tmp_path)
    assert {row["variant"] for row in rows} == {"gated delta, decay per head", "4 taps, silu, gate"}
    for row in rows:
        if row["form"] == "pallas_tpu":
            assert "it runs on TPUs; this is cpu" in row["refused"]
        else:
            assert row["forward"] == row["both"] == 0.002 and not row["wrong"]
            assert max(error for error, _ in row["errors"].values()) < 1e-5
    printed = capsys.readouterr().out
    assert "2.000      -      -" in printed and "it runs on TPUs; this is cpu" in printed


def test_a_wrong_form_is_reported_and_not_timed(only, capsys):
    only(wrong=lambda x: case.run(x, "xla") * 1.001)
    case = kernel_cases.CASES["linear_recurrence", "no decay"]()
    assert kernels.main(["--operations", "linear_recurrence", "--backends", "xla"]) == 1
    assert "WRONG: output" in capsys.readouterr().out


def test_a_fault_of_a_form_is_no_refusal(only, tmp_path):
    """A ValueError while a kernel is traced, in its gradient or for its memory; the forms after it are measured, and
    the exit code says so."""

    def broken(x):
        raise ValueError("block of 48 rows")

    @jax.custom_vjp
    def without_gradient(q):
        return q

    def raises(kept, given):
        raise ValueError("no layout")

    without_gradient.defvjp(lambda q: (q, None), raises)
    only(broken=broken, backward=lambda x: without_gradient(x["q"]), last=lambda x: case.run(x, "xla"))
    case = kernel_cases.CASES["linear_recurrence", "no decay"]()
    assert kernels.main(["--operations", "linear_recurrence", "--backends", "pallas_tpu", "--out", str(tmp_path)]) == 1
    rows = {row["form"]: row for row in results(tmp_path)["rows"]}
    assert (
        rows["broken"]["error"] == "ValueError: block of 48 rows"
        and rows["backward"]["error"] == "ValueError: no layout"
    )
    assert not any("refused" in rows[form] for form in ("broken", "backward", "last"))
    assert "it runs on TPUs" in rows["pallas_tpu"]["refused"] and rows["last"]["both"] == 0.002


def test_what_is_refused_costs_nothing_and_the_reference_is_computed_once(only, monkeypatch):
    case = only(again=lambda x: case.run(x, "xla"))
    real, asked = kernel_case.with_gradients, []

    def counting(form):
        asked.append(getattr(form, "keywords", {}).get("backend", "a form"))
        return real(form)

    monkeypatch.setattr(kernel_case, "with_gradients", counting)
    arguments = ["--operations", "linear_recurrence", "--backends"]
    assert kernels.main([*arguments, "xla", "pallas_gpu"]) == 0
    # xla and "again" are compiled to be checked and to be timed, the reference once for both, pallas_gpu not at all.
    assert sorted(asked) == 4 * ["a form"] + ["reference"]
    asked.clear()
    only()
    assert kernels.main([*arguments, "pallas_tpu", "pallas_gpu"]) == 0
    assert asked == []


PROCESS = """
import os, signal, sys
from recollect.benchmarks import kernel_cases, timing, kernels
from tests.benchmarks.test_kernels import SMALL
import dataclasses

make = kernel_cases.CASES["linear_recurrence", "no decay"]
plain = {"fine": lambda x: make(**SMALL).run(x, "xla"), "fatal": lambda x: os.kill(os.getpid(), signal.SIGKILL)}
kernel_cases.CPU_SHAPES = {"linear_recurrence": [SMALL]}
case = dataclasses.replace(make(**SMALL), plain=plain)
kernel_cases.CASES = {("linear_recurrence", "no decay"): lambda **sizes: case}
timing.timed = lambda run, *arguments: (0.002, 0.0)
kernels.main(["--operations", "linear_recurrence", "--backends", "xla", "--out", sys.argv[1]])
"""


def test_rows_are_kept_when_the_process_is_killed(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROCESS, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    written = results(tmp_path)
    assert [(row["form"], row["both"]) for row in written["rows"]] == [("xla", 0.002), ("fine", 0.002)]
    assert written["unfinished"] == "linear_recurrence, no decay, b1 t48 h2 k8 v8 float32, fatal"


def peer_python(folder, body):
    """An interpreter for --peer-python that runs this instead of the script it is given. `line` is a case; `before`
    counts the processes before it."""
    path = folder / "python"
    counter = folder / "processes"
    path.write_text(
        f"#!{sys.executable}\nimport json, os, sys, time\n"
        f"before = os.path.getsize({str(counter)!r}) if os.path.exists({str(counter)!r}) else 0\n"
        f"open({str(counter)!r}, 'a').write('x')\nfor line in sys.stdin:\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
    )
    path.chmod(0o755)
    return str(path)


ANSWER = """print('RESULT ' + json.dumps({"forward": 0.001, "both": 0.004, "version": "fake 1"}), flush=True)\n"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("os.kill(os.getpid(), 9)", "the process ended: signal SIGKILL"),
        ("sys.exit(3)", "the process ended: exit code 3"),
        ("time.sleep(600)", "no answer in 2 s: killed"),
    ],
    ids=["killed", "ended", "hung"],
)
def test_a_peer_that_dies_or_hangs_has_a_row_that_says_so(body, said, small, tmp_path):
    """Our own forms are measured all the same, and the next case has a new process."""
    python = peer_python(tmp_path, f"if before == 0:\n    {body}\n{ANSWER}")
    arguments = ["--operations", "short_convolution", "taylor_attention", "--backends", "xla"]
    assert kernels.main([*arguments, "--peer-python", python, "--peer-seconds", "2", "--out", str(tmp_path)]) == 0
    rows = results(tmp_path)["rows"]
    first, second = (row for row in rows if row["form"] == "peer")
    assert first["error"] == said and second["both"] == 0.004
    assert sum(row["form"] == "xla" and row["both"] == 0.002 for row in rows) == 2


def test_a_peer_that_closed_its_input_does_not_end_the_benchmark(small, tmp_path):
    python = peer_python(tmp_path, ANSWER + "os.close(0); time.sleep(600)")
    arguments = ["--operations", "short_convolution", "taylor_attention", "--backends", "xla", "--peer-python", python]
    assert kernels.main([*arguments, "--out", str(tmp_path)]) == 0
    first, second = (row for row in results(tmp_path)["rows"] if row["form"] == "peer")
    assert first["both"] == 0.004 and second["error"] == "the process ended: it reads no more cases"


def test_a_peer_without_a_backward_pass_keeps_its_forward_time(small, tmp_path, capsys):
    answer = {"forward": 0.001, "backward_error": "RuntimeError: Triton 3.6", "version": "fake 1", "broken": True}
    python = peer_python(tmp_path, f"print('RESULT ' + json.dumps({answer!r}), flush=True)")
    arguments = ["--operations", "short_convolution", "taylor_attention", "--backends", "xla", "--peer-python", python]
    assert kernels.main([*arguments, "--out", str(tmp_path)]) == 0
    peers = [row for row in results(tmp_path)["rows"] if row["form"] == "peer"]
    assert [(row["forward"], "both" in row, "broken" in row) for row in peers] == 2 * [(0.001, False, False)]
    assert (tmp_path / "processes").read_text() == "xx"  # a new one after a fault on the GPU
    printed = capsys.readouterr().out
    assert "RuntimeError: Triton 3.6" in printed and "2.000      -   2.00      2.000      -      -" in printed


class FakeTorch:
    """As much of torch as kernel_peers.measure needs, its gradients refused."""

    def __init__(self):
        self.freed = 0
        self.cuda = types.SimpleNamespace(is_available=lambda: True, synchronize=lambda: None, empty_cache=self.empty)
        self.autograd = types.SimpleNamespace(grad=self.refuse)
        self.no_grad, self.manual_seed, self.randn_like = contextlib.nullcontext, lambda seed: None, lambda x: x

    def empty(self):
        self.freed += 1

    def refuse(self, *_):
        raise RuntimeError("Triton 3.6 gives wrong results")


def test_peers_answer_forward_when_backward_fails(monkeypatch, capsys):
    torch = FakeTorch()
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(kernel_peers.PEERS, "some", lambda torch, b: (lambda: b, (), "fake 1"))
    monkeypatch.setattr(sys, "stdin", ['{"peer": "some", "sizes": {"b": 2}}\n', '{"peer": "none", "sizes": {}}\n'])
    peer_side.serve(kernel_peers.answer)
    first, second = (json.loads(line.removeprefix("RESULT ")) for line in capsys.readouterr().out.splitlines())
    assert 0 < first.pop("forward") < 1e-3
    assert first == {"version": "fake 1", "backward_error": "RuntimeError: Triton 3.6 gives wrong results"}
    assert second == {"error": "KeyError: 'none'"} and torch.freed == 2

    def fails():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.cuda.synchronize = fails
    peer_side.serve(kernel_peers.answer)
    assert [json.loads(line.removeprefix("RESULT "))["broken"] for line in capsys.readouterr().out.splitlines()] == [
        True,
        True,
    ]


def test_floors_come_from_the_arrays():
    case = kernel_cases.CASES["linear_recurrence", "no decay"](b=2, t=4096, h=16, k=128, v=128)
    inputs = {name: jax.ShapeDtypeStruct((2, 4096, 16, 128), jnp.bfloat16) for name in ("q", "k", "v")}
    inputs = {name: jnp.zeros(x.shape, x.dtype) for name, x in inputs.items()}
    floors = timing.floors(case, inputs, "NVIDIA H100 80GB HBM3")
    tensor = 2 * 4096 * 16 * 128 * 2
    assert floors == {"forward": pytest.approx(4 * tensor / 3.35e12), "both": pytest.approx(11 * tensor / 3.35e12)}
    assert timing.floors(case, inputs, "cpu") is None


def test_libraries_are_asked_where_an_operation_has_them():
    everything = ["pallas_gpu", "cudnn", "splash", "jla", "xla"]
    recurrence = kernel_cases.CASES["linear_recurrence", "no decay"](**SMALL)
    causal = kernel_cases.CASES["softmax_attention", "causal"](**SMALL)
    assert list(kernels._forms(recurrence, everything)) == ["pallas_gpu", "jla", "xla", "square form"]
    assert list(kernels._forms(causal, everything)) == [
        "pallas_gpu",
        "cudnn",
        "splash",
        "xla",
        "softmax over all pairs",
        "jax.nn",
    ]


SOFTMAX = [
    ("softmax_attention", "causal", {}, "jax.nn"),
    ("softmax_attention", "window", {"w": 10}, "jax.nn"),
    ("softmax_attention", "window, sinks", {"w": 10, "g": 1}, "softmax over all pairs"),
    ("landmark_attention", "grouped softmax", {"block": 7}, "softmax over all pairs"),
    ("head_mixture_attention", "routed heads", {"h": 4, "a": 3}, "all heads, xla"),
]


@pytest.mark.parametrize(
    ("operation", "variant", "more", "form"), SOFTMAX, ids=[f"{case[0]}, {case[1]}" for case in SOFTMAX]
)
def test_plain_forms_of_softmax_attention_compute_the_same(operation, variant, more, form):
    case = kernel_cases.CASES[operation, variant](**{**SMALL, "t": 45, **more})
    errors = kernel_case.Check(case, jnp.float32).errors(case.plain[form])
    assert set(errors) == {"output", *case.inputs(jax.random.key(0), jnp.float32)}
    assert all(error < 1e-5 for error, _ in errors.values()), errors


def test_work_of_softmax_attention_is_that_of_the_pairs_seen():
    t, sizes = 45, {"b": 3, "h": 2, "k": 8, "v": 5}
    make = {key: functools.partial(case, t=t, **sizes) for key, case in kernel_cases.CASES.items()}
    causal, windowed = ([(i, j) for i in range(t) for j in range(t) if j <= i and i - j < w] for w in (t, 10))
    assert make["softmax_attention", "causal"]().work == 2 * 3 * 2 * len(causal) * (8 + 5)
    assert make["softmax_attention", "window"](w=10).work == 2 * 3 * 2 * len(windowed) * (8 + 5)
    assert make["head_mixture_attention", "routed heads"](a=1).work == 2 * 3 * 1 * len(causal) * (8 + 5)
    # Landmarks stand at 7, 15, ...: a query reads its own block's ordinary tokens, and all keys of earlier blocks but
    # the landmarks' values.
    earlier = [(i, j) for i, j in causal if j // 8 < i // 8]
    own = [(i, j) for i, j in causal if j // 8 == i // 8 and j % 8 != 7]
    valued = [(i, j) for i, j in earlier if j % 8 != 7]
    expected = 2 * 3 * 2 * ((len(own) + len(earlier)) * 8 + (len(own) + len(valued)) * 5)
    assert make["landmark_attention", "grouped softmax"](block=7).work == expected


def test_only_what_gpu_kernels_refuse_is_not_compiled_for_them():
    everything = kernel_cases.cases("gpu", list(kernel_cases.OPERATIONS))
    compiled = {
        program.name.replace(" bench forward", ",", 1)
        for program in benchmark.PROGRAMS
        if " bench forward " in program.name
    }
    assert compiled == {case.name for case in everything} - benchmark.REFUSED
    for case in everything:
        if case.name in benchmark.REFUSED:
            inputs = jax.eval_shape(functools.partial(case.inputs, dtype=jnp.bfloat16), jax.random.key(0))
            with dispatch.aimed_at("gpu", "NVIDIA H100 80GB HBM3"), pytest.raises(dispatch.Refused):
                jax.eval_shape(functools.partial(case.run, backend="pallas_gpu"), inputs)


def test_gradients_are_checked_at_sizes_that_keep_the_case():
    """The window is still shorter than the sequence, query heads still share key heads, and as large a share of the
    heads is active."""
    for platform in ("cpu", "gpu"):
        for case in kernel_cases.cases(platform, ["softmax_attention", "landmark_attention", "head_mixture_attention"]):
            small = kernel_cases.smaller(case).sizes
            assert (
                small["b"] == 1
                and small["t"] == min(320, case.sizes["t"])
                and small["h"] <= 4
                and small["k"] == case.sizes["k"]
            )
            if "w" in small:
                assert small["w"] < small["t"] / 2
            for name in {"g", "a"} & small.keys():
                assert small[name] / small["h"] == case.sizes[name] / case.sizes["h"]


def test_work_of_a_window_grows_with_length_and_window():
    """As the compiler counts it for the xla form, backward included; causal attention's grows with the square."""

    def counted(variant, t, **sizes):
        case = kernel_cases.CASES["softmax_attention", variant](b=1, t=t, h=1, k=8, v=8, **sizes)
        inputs = {name: jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32) for name in ("q", "k", "v")}
        function = jax.jit(kernel_case.with_gradients(lambda x: case.run(x, "xla")))
        return function.lower(inputs, inputs["v"]).compile().cost_analysis()["flops"]

    base = counted("window", 512, w=64)
    assert 1.9 < counted("window", 1024, w=64) / base < 2.1
    assert 1.8 < counted("window", 512, w=128) / base < 2.2
    assert 3.5 < counted("causal", 1024) / counted("causal", 512) < 4.1


def test_times_are_those_of_a_call():
    x = jnp.ones((256, 256))
    programs = [jax.jit(lambda x, n=n: jax.lax.fori_loop(0, n, lambda _, y: y @ x / 256, x)) for n in (1, 100)]
    (few, spread), (many, _) = (timing.timed(run, x, turns=3) for run in programs)
    assert 0 < few < many and spread >= 0


def test_lengths_grow_and_are_measured(small, capsys):
    assert kernels.main(["--lengths", "--longest", "2048", "--operations", "taylor_attention"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("taylor_attention")]
    assert len(lines) == 2 and lines[0].split()[2] == "1,024" and lines[1].split()[2] == "2,048"


def test_lengths_stop_where_a_call_takes_long(small, monkeypatch, capsys):
    monkeypatch.setattr(timing, "timed", lambda run, *arguments: (3.0, 0.0))
    assert kernels.main(["--lengths", "--longest", "4096", "--operations", "taylor_attention"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("taylor_attention")]
    assert len(lines) == 2 and "2,048 not timed, as 1,024 tokens take more than 2 s" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operations", "matmul"], "no operation 'matmul'"),
        (["--backends", "cuda"], "no backend 'cuda'"),
        (["--colour"], "unrecognized arguments"),
        (["--operations", "taylor_attention", "--peer-python", "/no/python"], "cannot be run"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        kernels.main(arguments)
