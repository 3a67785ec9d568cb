"""`main.py bench head-mixture`: its options, what it times, and that both forms are the same layer."""

from __future__ import annotations

import json

import pytest

from recollect.benchmarks import head_mixture
from recollect.benchmarks.timing import time_in_turns
from recollect.configuration import UserError
from recollect.layers.mixers import mixture_of_heads
from recollect.pallas_kernels.head_mixture_attention import xla


def test_shares_go_from_an_eighth_to_all():
    assert head_mixture._routings(8) == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 6), (0, 8), (2, 3)]


def test_forms_are_told_apart_while_they_are_traced():
    with head_mixture.computed("gathered"):
        assert mixture_of_heads.skips(1024, 1024, 6, 3, self_attention=True)
    with head_mixture.computed("dense"):
        assert not mixture_of_heads.skips(1024, 1024, 6, 3, self_attention=True)


def test_turns_alternate():
    calls = []
    times = time_in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, turns=2)
    assert calls == list("ababab") and set(times) == {"a", "b"}


@pytest.mark.parametrize("arguments", [["--turns", "0"], ["--depth", "2"]])
def test_options_that_do_not_fit_are_named(arguments):
    with pytest.raises(UserError, match=arguments[0]):
        head_mixture.main(arguments)


@pytest.mark.slow
def test_it_checks_times_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(head_mixture, "_routings", lambda heads: [(1, 1)])
    monkeypatch.setattr(xla, "FEWEST_TOKENS", 1)
    sizes = ["--length", "48", "--batch", "1", "--heads", "4", "--head-dim", "8", "--turns", "1"]
    assert head_mixture.main([*sizes, "--out", str(tmp_path)]) == 0
    assert "1 + 1 of 4, 0.500" in capsys.readouterr().out
    (path,) = tmp_path.glob("*/head_mixture.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["error"] < 1e-4 and all(
        row[part][form] > 0 for part in ("forward", "training_step") for form in head_mixture.FORMS
    )
