import csv
import dataclasses
import math

import pytest

from recollect.configuration import UserError
from recollect.evaluation.results import load_runs
from recollect.evaluation.summaries import summarise
from recollect.evaluation.table import (
    format_bytes,
    format_count,
    format_seconds,
    format_table,
    write_csv,
)
from tests.evaluation.folders import study, write_run


def test_numbers_are_written_as_people_write_them():
    assert [format_bytes(size) for size in (None, 0, 1023, 12595, 1024 * 1024 - 1, 5 * 2**20, 3 * 2**40)] == [
        *("-", "0 B", "1,023 B", "12.3 KiB", "1.0 MiB", "5.0 MiB", "3,072.0 GiB")
    ]
    assert [format_count(number) for number in (1234, 9_999_999, 360_100_000, 1.34e9, math.nan)] == [
        "1,234",
        "9,999,999",
        "360.1M",
        "1.3G",
        "-",
    ]
    assert [format_seconds(seconds) for seconds in (0.04, 59.97, 60, 3599.6, 12_010)] == [
        "0.0s",
        "1m 00s",
        "1m 00s",
        "1h 00m",
        "3h 20m",
    ]


def test_table_is_sorted_aligned_and_fits(tmp_path):
    runs = study(tmp_path, {"mqar.window": 0.4, "mqar.attention": 1.0, "mqar.convolution": 0.1})
    text = format_table(list(reversed(summarise(runs))))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["mqar.attention", "mqar.window", "mqar.convolution"]
    assert lines[2].split()[1:6] == ["100.0", "0.0", "75.0", "0.003", "2×2"]
    assert "state@128" in lines[0] and "1.6 KiB" in lines[2]
    # Right-aligned: every number ends where its header ends.
    end = lines[0].index("median") + len("median")
    assert all(line[end - 1] != " " and line[end : end + 2] == "  " for line in lines[2:5])
    assert lines[6].split() == ["architecture", "64x4", "64x16", "128x8"]


def test_the_widest_table_fits_120_columns(tmp_path):
    runs = study(tmp_path, {"mqar." + "long_" * 12 + "first": 0.4, "mqar." + "long_" * 12 + "second": 1.0})
    slices = {f"{2**i}x{i}": 1.0 for i in range(6, 30)}
    wide = {
        "parameters": 9_999_999,
        "tokens_per_second": 9_999_999.0,
        "seconds": 3599.0,
        "diverged": 1,
        "learning_rate": 1.2e-5,
    }
    big = [dataclasses.replace(s, by_slice=slices, state_bytes={128: 1023 * 2**20}, **wide) for s in summarise(runs)]
    lines = format_table(big).splitlines()
    assert max(map(len, lines)) <= 120
    # Shortened labels still tell the two apart.
    ends = [line.split()[0].removeprefix("mqar.")[-6:] for line in lines if line.startswith("mqar")]
    assert "…" in lines[2] and set(ends) == {"_first", "second"} and ends[::2] == ["second"] * (len(ends) // 2)
    assert all(any(name in line.split() for line in lines) for name in slices)


def test_recall_and_text_get_a_table_each(tmp_path):
    recall = summarise(study(tmp_path, {"mqar.based": 0.5}))
    text = [
        dataclasses.replace(
            recall[0], label=f"text.{bits}", metric="bits_per_byte", best=bits, by_slice={}, by_rate={}, edges={}
        )
        for bits in (1.5, 1.25)
    ]
    parts = format_table([*recall, *text]).split("\n\n")
    assert "2 tables" in parts[0] and "accuracy %" in parts[1] and "bits/byte" in parts[-1]
    assert [line.split()[1] for line in parts[-1].splitlines()[2:]] == ["1.250", "1.500"]


def test_csv_reads_back_the_same_numbers(tmp_path):
    runs = load_runs(
        [
            write_run(tmp_path / "a", accuracy=1 / 3, loss=math.nan),
            write_run(
                tmp_path / "b", "mqar.window", rate=0.1 + 0.2, state_bytes={"2048": 5}, overrides={"model.width": 3}
            ),
        ]
    )
    path = tmp_path / "out" / "results.csv"
    write_csv(path, runs)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["accuracy"]) == 1 / 3 and float(rows[0]["accuracy[128x8]"]) == 1 / 6
    assert float(rows[1]["learning_rate"]) == 0.1 + 0.2 and math.isnan(float(rows[0]["loss"]))
    assert (rows[0]["state_bytes[64]"], rows[0]["state_bytes[2048]"], rows[1]["state_bytes[2048]"]) == (
        "12468",
        "",
        "5",
    )
    assert (
        rows[0]["bits_per_byte"] == ""
        and rows[1]["override[model.width]"] == "3"
        and rows[0]["override[run.seed]"] == "0"
    )
    columns = list(rows[0])
    assert columns[:4] == ["folder", "name", "label", "status"]
    wanted = [
        "state_bytes[64]",
        "state_bytes[128]",
        "state_bytes[1024]",
        "state_bytes[2048]",
        "accuracy[64x4]",
        "accuracy[64x16]",
        "accuracy[128x8]",
    ]
    assert [column for column in columns if column.startswith(("state", "accuracy["))] == wanted
    assert len(rows) == 2 and list(path.parent.iterdir()) == [path]


def test_nothing_to_write_or_nowhere_to_write_it(tmp_path):
    with pytest.raises(UserError, match="no finished runs"):
        format_table([])
    with pytest.raises(UserError, match="no finished runs"):
        write_csv(tmp_path / "x.csv", [])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*x.csv"):
        write_csv(tmp_path / "file" / "x.csv", load_runs([write_run(tmp_path / "a")]))


def test_scores_by_learning_rate_and_the_edge_of_what_was_tried(tmp_path):
    text = format_table(summarise(study(tmp_path, {"mqar.window": 0.4, "mqar.attention": 1.0})))
    lines = text.splitlines()
    assert lines[2].split()[:6] == ["mqar.attention", "100.0", "0.0", "75.0", "0.003", "2×2"]  # solved: no arrow
    assert lines[3].split()[:6] == ["mqar.window", "40.0", "0.0", "30.0", "0.003", "↑"]
    rates = next(index for index, line in enumerate(lines) if "lr 0.001" in line)
    assert lines[rates].split() == ["architecture", "lr", "0.001", "lr", "0.003"]
    assert [line.split()[1:] for line in lines[rates + 2 : rates + 4]] == [["50.0", "100.0"], ["20.0", "40.0"]]
    assert lines[-1].startswith("↑ ↓ the best learning rate is the highest or lowest tried")


def test_each_task_has_a_table_and_the_first_line_says_so(tmp_path):
    data = [{"class": "MQAR", "length": length} for length in (64, 128)]
    folders = [write_run(tmp_path / str(index), data=config) for index, config in enumerate(data)]
    parts = format_table(summarise(load_runs(folders))).split("\n\n")
    assert parts[0] == "2 tables: scores of different tasks or metrics do not compare"
    assert [part.splitlines()[0] for part in parts if part.startswith("MQAR")] == [
        "MQAR [length=128]",
        "MQAR [length=64]",
    ]


def test_a_run_that_went_on_after_its_schedule_is_marked(tmp_path):
    extended = {"step": 100, "steps_before": 100}
    runs = load_runs([write_run(tmp_path / "a", "mqar.window"), write_run(tmp_path / "b", extended=extended)])
    text = format_table(summarise(runs))
    assert "mqar.based* " in text and "mqar.window* " not in text
    assert "* went on with more steps than its schedule had" in text
    assert "*" not in format_table(summarise(runs[:1]))


def test_token_ids_without_a_tokenizer_are_scored_in_bits_per_token_lowest_first(tmp_path):
    runs = [
        write_run(tmp_path / name, f"text.{name}", accuracy=None, chance=None, bits_per_token=bits, curve=[])
        for name, bits in (("high", 5.0), ("low", 4.0))
    ]
    lines = format_table(summarise(load_runs(runs))).splitlines()
    assert "bits/token" in lines[0] and "bits/byte" not in lines[0]
    assert [line.split()[:2] for line in lines[2:4]] == [["text.low", "4.000"], ["text.high", "5.000"]]


def test_what_only_guesses_is_said(tmp_path):
    for name, score in (("a", 0.05), ("b", 0.5)):
        write_run(tmp_path / name, name, accuracy=score, chance=0.0625)
    table = format_table(summarise(load_runs(tmp_path.iterdir())))
    assert "no better than a guess: a (6.25 %)" in table
