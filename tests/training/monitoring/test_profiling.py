"""Traces of a window of steps, and the folder of compiled programs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from recollect.configuration import UserError
from recollect.configuration.machine import cpu_features, keep_compiled_programs
from recollect.training.experiment import Run
from recollect.training.monitoring.profiling import Profile, parse_window


def test_windows():
    assert parse_window("10:15") == (10, 15)
    for wrong in ("10", "15:10", "5:5", "a:b", "-1:4", ":"):
        with pytest.raises(UserError, match="the form is FIRST:LAST"):
            Run(profile=wrong)


def test_whole_calls_are_traced(monkeypatch, tmp_path):
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    said = []

    def ten_steps(profile, step):
        profile.before_call(SimpleNamespace(pipeline=SimpleNamespace(sent=step)), 10)
        events.append(step)
        profile.after_call(None, SimpleNamespace(end=step + 10))

    profile = Profile("12:21", tmp_path, said.append)
    for step in range(0, 50, 10):
        ten_steps(profile, step)
    profile.close(None)
    assert events == [0, "start", 10, 20, "stop", 30, 40]
    assert len(said) == 1 and said[0].startswith(f"  trace of steps 11 to 30: {tmp_path}") and "xprof" in said[0]
    short = Profile("12:100", tmp_path, said.append)
    ten_steps(short, 40)
    short.close(None)
    assert events[-3:] == ["start", 40, "stop"] and said[1].startswith("  trace of steps from 41 on")


def test_compiled_programs_are_kept_where_asked(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cpu"))
        by_features = keep_compiled_programs(None)  # a CPU's code belongs to its features
        assert by_features == tmp_path / "cpu" / "compiled" / f"cpu-{cpu_features()}-jax-{jax.__version__}"
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        folder = tmp_path / "compiled"
        assert keep_compiled_programs(str(folder)) == folder
        jax.jit(lambda x: jnp.tanh(x) * 17)(jnp.ones(3))
        assert list(folder.iterdir())
        assert keep_compiled_programs(None) == folder  # what jax was told otherwise stays
        assert keep_compiled_programs("off") is None and jax.config.jax_compilation_cache_dir is None
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
        assert keep_compiled_programs(None) == tmp_path / "cache" / "compiled"
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="the folder cannot be made"):
            keep_compiled_programs(str(tmp_path / "file" / "inner"))
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        keep_compiled_programs("off" if before is None else before)
