"""`main.py bench field`: a row per mixer, and options that do not fit."""

from __future__ import annotations

import json

import pytest

from recollect.benchmarks import field
from recollect.configuration import UserError


def test_a_mixer_is_timed_beside_attention_and_written(tmp_path, capsys):
    assert field.main(["--mixers", "based", "--turns", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/field.json")
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    assert row["mixer"] == "based" and row["parameters"] == 30_400 and "unfinished" not in result
    assert row["x_attention"] == pytest.approx(row["mixer_ms"] / row["attention_ms"]) and row["attention_ms"] > 0
    assert "based" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--mixers", "basde"], ["--turns", "0"]])
def test_options_that_do_not_fit_are_named(arguments):
    with pytest.raises(UserError, match=arguments[1]):
        field.main(arguments)
