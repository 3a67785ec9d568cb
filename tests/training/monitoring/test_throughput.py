"""Rates of a run: what counts as a step's time, the FLOPs of MFU against formulas, chips by name, and what a real
run's files hold."""

import json
import time

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.layers import Attention, Hyena, LinearAttention
from recollect.layers.modules.feature_maps import EluPlusOne
from recollect.layers.modules.mlp import SwiGLU
from recollect.models import FunctionalModel, LanguageModel, repeat
from recollect.models.accounting import flops_per_token
from recollect.training.monitoring.chips import chip_of
from recollect.training.monitoring.model_flops import training_flops_per_token
from recollect.training.monitoring.run_log import Meter, Rates
from recollect.training.train import train
from tests.training.tiny import tiny


def test_rates_are_sums_over_calls():
    meter = Meter(flops_per_token=100.0, peak=1e6)
    assert meter.total() is None and meter.since("log") is None
    meter.step(2, 1000, 0.5, 0.1)
    first = meter.since("log")
    assert first == Rates(tokens_per_second=2000.0, step_seconds=0.25, waiting_for_data=0.2, mfu=0.2)
    meter.step(2, 1000, 1.5, 0.0)
    meter.step(4, 2000, 0.5, 0.0)
    assert meter.since("log") == Rates(1500.0, 2 / 6, 0.0, 0.15)
    assert meter.since("log") is None
    total = meter.since("another reader")
    assert total == meter.total() == Rates(1600.0, 2.5 / 8, 0.04, 0.16)
    assert total.text() == "1,600 tokens/s, 312 ms per step, MFU 16.0%, 4.0% waiting for data"
    assert Rates(1600.0, 2.5, 0.0, None).text() == "1,600 tokens/s, 2.5 s per step, 0.0% waiting for data"
    assert set(Rates(1.0, 1.0, 0.0, None).facts()) == {"tokens_per_second", "step_seconds", "waiting_for_data"}


def test_compiling_does_not_count_as_a_steps_time():
    meter = Meter()

    def many(x):
        for i in range(60):
            x = jnp.sin(x) @ (x + i)
        return x

    begun = time.perf_counter()
    jax.block_until_ready(jax.jit(many)(jnp.ones((8, 8))))
    seconds = time.perf_counter() - begun
    meter.step(1, 64, seconds)
    assert meter.total().step_seconds < 0.5 * seconds
    time.sleep(0.05)
    meter.since("log")
    meter.step(1, 64, 10.0)  # what was compiled before the call above ended counts once
    assert meter.since("log").step_seconds == 10


def test_products_by_formula():
    d, hidden, vocabulary, t, h = 32, 48, 64, 256, 2

    def cost(mixer, depth=3, **fields):
        model = LanguageModel(width=d, stages=repeat(mixer, depth=depth), mlp=SwiGLU(hidden=hidden), **fields)
        return flops_per_token(FunctionalModel(model, vocabulary), t)

    rest = 3 * (2 * 4 * d * d + 2 * 3 * d * hidden) + 2 * d * vocabulary
    # Two blocks of 128 queries against 128 and 256 keys, scores and values: three quarters of the square.
    assert cost(Attention(heads=h)) == rest + 3 * 0.75 * 2 * 2 * t * d
    same = {cost(Attention(heads=h), **fields) for fields in ({}, {"remat": "full"}, {"unroll": True})}
    assert len(same) == 1
    linear = LinearAttention(heads=h, feature_map=EluPlusOne(), chunk=32)
    assert cost(linear) > rest
    assert cost(linear, depth=5) - cost(linear, depth=4) == pytest.approx(cost(linear, depth=4) - cost(linear, depth=3))


def test_products_of_transforms_and_convolutions():
    def count(function, *shapes):
        from recollect.models.accounting import _flops

        return _flops(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr)

    assert count(lambda x: jnp.fft.rfft(x), (3, 64)) == 3 * 2.5 * 64 * 6
    convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, (1,), "SAME", feature_group_count=2)  # noqa: E731
    assert count(convolve, (1, 8, 10), (6, 4, 3)) == 2 * (6 * 10) * 4 * 3
    assert count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y, lambda y: y, x), (4, 4)) == 2 * 4**3
    model = LanguageModel(width=16, stages=repeat(Hyena(maximum_length=64), depth=1))
    assert flops_per_token(FunctionalModel(model, 16), 64) > 2 * 16 * (3 * 16 + 16 + 16)


def test_training_takes_three_times_the_forward_flops(tmp_path):
    experiment = tiny(tmp_path)
    forward = flops_per_token(FunctionalModel(experiment.model, 32), 16)
    assert training_flops_per_token(experiment) == 3 * forward > 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("cpu", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_chips_by_jax_names(kind, name):
    chip = chip_of(kind)
    assert (chip and chip.name) == name


def test_a_run_tells_its_rates_and_leaves_a_trace(tmp_path):
    said = []
    begun = time.perf_counter()
    result = train(
        tiny(tmp_path / "run", steps=30, profile="10:12", evaluate_every=30, checkpoint_every=30), log=said.append
    )
    wall = time.perf_counter() - begun
    assert result["tokens_per_second"] == pytest.approx(16 * 16 / result["step_seconds"])
    assert 0 < result["step_seconds"] * 30 < wall
    assert result["waiting_for_data"] == 0 and "mfu" not in result
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["throughput"] for line in lines if "loss" in line]
    assert len(rates) == 3 and all(rate["tokens_per_second"] > 0 for rate in rates)
    assert np.mean([rate["step_seconds"] for rate in rates]) == pytest.approx(result["step_seconds"])
    assert any(line.startswith(f"  trace of steps 11 to 20: {tmp_path / 'run' / 'profile'}") for line in said)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_the_first_line_of_a_run(tmp_path):
    from recollect.configuration.console import NOW
    from recollect.training.batches import Call
    from recollect.training.monitoring.run_log import RunLog
    from recollect.training.run_state import RunState

    said = []
    run = RunState(tiny(tmp_path / "run"), said.append)
    run.meter = Meter(10.0, 1e6)
    run.meter.step(10, 20_000, 2.0, 0.001)
    metrics = {"loss": np.full(10, 2.5), "gradient_norm": np.full(10, 0.25), "skipped": np.zeros(10)}
    log = RunLog(run)
    log.after_call(run, Call(10, 10, metrics, None, 0.0, 0.0, 2.0))
    log.after_call(run, Call(20, 10, {**metrics, "skipped": np.ones(10)}, None, 0.0, 0.0, 2.0))
    assert said == [
        "  step 10/60 loss 2.5000, gradient norm 0.25, 10,000 tokens/s, 200 ms per step, MFU 10.0%, "
        "0.1% waiting for data"
    ]
    # The console shows the others; what is not finite is explained before it is shown.
    assert NOW.what == "step 20/60" and NOW.job[:2] == (20, 60)
    assert NOW.job[2]() == "10 of 10 steps skipped, loss 2.5000, gradient norm 0.25"
    log.close(run)
    assert NOW.job is None


def test_a_warmup_longer_than_its_run_is_reported(tmp_path):
    from recollect.training.monitoring.run_log import RunLog
    from recollect.training.run_state import RunState

    for warmup, decay_steps, reported in ((61, None, 1), (60, None, 0), (61, 100, 0)):
        said, plain = [], tiny(tmp_path / f"{warmup}-{decay_steps}")
        optimizer = chz.replace(plain.optimizer, warmup=warmup, decay_steps=decay_steps)
        run = RunState(chz.replace(plain, optimizer=optimizer), said.append)
        RunLog(run).begin(run, parameters=1)
        assert sum("optimizer.warmup=61: no step reaches the peak" in line for line in said) == reported


def test_values_only_fields_do_not_change_the_program(tmp_path):
    from recollect.training.experiment import program_of

    experiment = tiny(tmp_path)
    other = chz.replace(experiment, run=chz.replace(experiment.run, profile="1:2", compile_cache="off"))
    assert program_of(experiment) == program_of(other)
