"""`main.py bench decomposition`: its options, how times to losses are read off curves, and a whole small run of it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from recollect.benchmarks import decomposition
from recollect.configuration import UserError


def curve(*points):
    return [{"step": step, "seconds": seconds, "bits_per_byte": bits} for step, (seconds, bits) in enumerate(points)]


def test_times_to_losses_are_interpolated_between_evaluations():
    one = curve((0, 8.0), (10, 6.0), (20, 5.0), (30, 5.2), (40, 4.0))
    assert (
        decomposition.time_to(one, 7.0) == 5
        and decomposition.time_to(one, 5.0) == 20
        and decomposition.time_to(one, 4.6) == 35
    )
    assert decomposition.time_to(one, 3.9) is None
    two = curve((0, 8.0), (5, 5.0), (10, 4.52))
    rows = decomposition.times_to_losses(one, two)
    assert [row["bits_per_byte"] for row in rows] == [5.55, 5.05, 4.8, 4.65, 4.55]
    assert rows[0]["ratio"] == pytest.approx(14.5 / (5 * 2.45 / 3))
    assert decomposition.times_to_losses(curve((0, 8.0)), two) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--turn", "0"], "--turn 0"), (["--rows", "2"], "--rows"), (["--shortest", "48"], "shortest=48")],
)
def test_options_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        decomposition.main(arguments)


def test_a_small_run_measures_both_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(30):
        (folder / f"{index}.txt").write_bytes(
            random.integers(97, 101, int(random.integers(20, 200)), np.uint8).tobytes()
        )
    sizes = [
        "--length",
        "32",
        "--shortest",
        "16",
        "--width",
        "16",
        "--depth",
        "1",
        "--heads",
        "1",
        "--batch",
        "2",
        "--held-out",
        "2",
    ]
    more = ["--steps", "8", "--turn", "4", "--cycle", "4", "--source", str(folder), "--out", str(tmp_path / "results")]
    assert decomposition.main([*sizes, *more]) == 0
    (path,) = (tmp_path / "results").glob("*/decomposition.json")
    found = json.loads(path.read_text())
    for name, lengths in (("chunked", {"32"}), ("decomposed", {"16", "32"})):
        part = found[name]
        assert (
            part["by_length"].keys() == lengths
            and sum(row["steps"] for row in part["by_length"].values()) == 8 == part["steps"]
        )
        assert part["tokens"] == 8 * 64 and [point["step"] for point in part["curve"]] == [0, 4, 8]
        assert part["seconds"] > 0 and part["share_waiting_for_data"] > 0
    # Both start from the same parameters and are measured on the same held-out rows.
    assert found["chunked"]["curve"][0]["bits_per_byte"] == found["decomposed"]["curve"][0]["bits_per_byte"]
    assert 0.5 < found["decomposed"]["rows"]["retained_share"] < 1
    assert "kept by decomposition" in capsys.readouterr().out
