"""A first contact with a GPU: what children write is not lost, deadlines hold, and the page made of it says what was
measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from recollect.benchmarks import device
from recollect.benchmarks.first_contact import families, predictions, records, steps
from recollect.benchmarks.first_contact.processes import Child, Group, Step
from recollect.benchmarks.first_contact.table import table
from recollect.benchmarks.kernel_cases import CASES
from recollect.configuration import UserError


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def ended(child: Child) -> None:
    while child.running():
        time.sleep(0.02)


def step(name: str, text: str, seconds: float = 20.0) -> Step:
    return Step(
        name,
        python(f"from recollect.benchmarks.first_contact import records\n{text}"),
        seconds,
        {"PYTHONPATH": str(steps.REPOSITORY)},
    )


def test_lines_are_on_disk_and_a_torn_one_is_left_out(tmp_path):
    path = tmp_path / records.FILE
    records.write("check", path=path, what="a", wrong=[])
    with path.open("a") as file:
        file.write('{"kind": "time", "wh')
    (line,) = records.read(path)
    assert (line["kind"], line["what"]) == ("check", "a")
    assert records.read(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("text", "code", "name"),
    [
        ("records.write('started', what='x'); import time; time.sleep(60)", -signal.SIGKILL, "SIGKILL"),
        ("records.write('started', what='x'); import os; os.abort()", -signal.SIGABRT, "SIGABRT"),
        ("records.write('started', what='x'); raise SystemExit(3)", 3, ""),
    ],
    ids=["hangs", "aborts", "fails"],
)
def test_the_end_of_a_child_is_recorded_beside_what_it_launched(tmp_path, text, code, name):
    file = tmp_path / records.FILE
    child = Child(step("check: x", text, seconds=4), tmp_path, file)
    ended(child)
    started, end = records.read(file)
    assert started["what"] == "x" and started["step"] == end["step"] == "check: x"
    assert (end["code"], end["signal"]) == (code, name)
    assert end["why"] == ("deadline" if name == "SIGKILL" else "")
    assert "ENDED check: x" in table(records.read(file)) and "last launch: x" in table(records.read(file))


def test_a_childs_own_children_end_with_it(tmp_path):
    text = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    text += "print(p.pid, flush=True); p.wait()"
    child = Child(Step("x", python(text), 3), tmp_path, tmp_path / records.FILE)
    ended(child)
    grandchild = int(child.log.read_text())
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{grandchild}") and time.monotonic() < end:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{grandchild}")


def test_a_missing_program_is_one_line(tmp_path):
    child = Child(Step("counters: x", ["no-such-profiler"], 5), tmp_path, tmp_path / records.FILE)
    ended(child)
    (line,) = records.read(tmp_path / records.FILE)
    assert line["code"] == 127 and "no no-such-profiler here" in line["tail"]


def test_a_group_keeps_to_its_number_and_names_what_it_never_started(tmp_path):
    file = tmp_path / records.FILE
    waits = "import time; records.write('started', what='x'); time.sleep(30)"
    group = Group([step("a", waits), step("b", waits), step("c", waits)], 2, tmp_path, file)
    assert group.advance() and len(group.children) == 2
    group.stop("time was over")
    ends = {line["step"]: line for line in records.read(file) if line["kind"] == "ended"}
    assert ends["a"]["why"] == ends["b"]["why"] == "time was over" and ends["c"]["why"] == "not started: time was over"


def test_a_turn_begins_at_its_gate_and_ends_by_itself(tmp_path):
    text = "from pathlib import Path; from recollect.benchmarks.first_contact import child; import sys, time\n"
    text += "child.wait(Path(sys.argv[1]), 1); print('begun', flush=True); time.sleep(60)"
    gate = tmp_path / "gate"
    process = subprocess.Popen([*python(text), str(gate)], stdout=subprocess.PIPE, cwd=steps.REPOSITORY, text=True)
    time.sleep(0.3)
    assert process.poll() is None
    gate.touch()
    assert process.communicate(timeout=20)[0] == "begun\n" and process.returncode == -signal.SIGALRM


def test_a_call_does_not_take_an_earlier_ones_records_for_its_own(tmp_path, monkeypatch):
    file, gate = tmp_path / records.FILE, tmp_path / "gate"
    for kind, name, facts in (("ready", "time: x", {}), ("ended", "check: x", {"code": -signal.SIGABRT})):
        monkeypatch.setenv("FIRST_CONTACT_STEP", name)
        records.write(kind, path=file, **facts)
    records.write("begun", path=file)
    assert len(records.read(file)) == 3 and [line["kind"] for line in records.read_call(file)] == ["begun"]
    text = f"import pathlib, time; time.sleep(0.5); print(pathlib.Path({str(gate)!r}).exists()); records.write('ready')"
    turns = Group([step("time: x", text)._replace(gate=gate)], 1, tmp_path, file)
    turns.take(time.monotonic() + 20, 10)
    assert (tmp_path / "time--x.log").read_text() == "False\n" and records.read(file)[-1]["code"] == 0


def test_the_parent_names_the_families_and_every_timing_is_a_case():
    assert set(steps.FAMILIES) == set(families.FAMILIES) and set(steps.SWEEPS) == set(families.SWEEPS)
    assert set(steps.COUNTED + steps.CHECKED_FOR_MEMORY) <= set(steps.FAMILIES)
    names = {timing.case.name for family in families.FAMILIES.values() for timing in family.timings}
    assert {prediction.what for prediction in predictions.PREDICTIONS} <= names
    for family in families.FAMILIES.values():
        for timing in family.timings:
            small = CASES[timing.operation, timing.variant](**families.tiny(timing.sizes))
            assert small.sizes.keys() == timing.case.sizes.keys()
            assert all(timing.case.sizes[name] >= size for name, size in small.sizes.items())
    covered = {(timing.operation, timing.variant) for family in families.FAMILIES.values() for timing in family.timings}
    assert covered == set(CASES)


def test_the_tests_log_is_read_as_far_as_it_goes(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "8 workers [94 items]\n\n[gw0] [  1%] PASSED tests/a.py::test_x[1 2] \n"
        "[gw1] [  2%] FAILED tests/a.py::test_y \n"
    )
    assert steps.tests_summary(log) == {
        "summary": "1 passed, 1 failed, 0 skipped, 92 not reached",
        "failed": ["tests/a.py::test_y"],
    }
    log.write_text("collected 8 items / 7 deselected / 1 selected\n\ntests/a.py::test_x PASSED                [100%]\n")
    assert steps.tests_summary(log)["summary"] == "1 passed, 0 failed, 0 skipped, 0 not reached"


def test_a_rehearsal_says_what_it_lost(tmp_path, capsys):
    plan = steps.Plan(tmp_path, tmp_path, tmp_path, True, ["landmark", "Taylor"], ["tests"], [])
    lines = [
        {"kind": "check", "step": "check: Taylor", "what": "x"},
        {"kind": "time", "step": "time: Taylor", "what": "x"},
    ]
    plan.faults = {"check: landmark": "abort"}
    lost = steps.lost(lines, plan, ("checks", "timings"))
    assert len(lost) == 3 and all("landmark" in line for line in lost)
    lines += [
        {"kind": "started", "step": "check: landmark", "what": "y"},
        {"kind": "ended", "step": "check: landmark", "code": -6},
    ]
    assert records.dead(lines) == {"time: landmark"} and len(steps.lost(lines, plan, ("checks", "timings"))) == 1
    lines += [{"kind": "ended", "step": "time: landmark", "code": -9, "why": "the family's check died"}]
    assert steps.lost(lines, plan, ("checks", "timings")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--families", "attnetion"], "--families attnetion: no family's name contains it"),
        (["--only", "check"], "argument --only: invalid choice"),
        (["--seconds", "5"], "--seconds 5: at least 30 are needed"),
        (["--seconds", "nan"], "--seconds nan: at least 30 are needed"),
        (["--tests", "tests/nothing.py"], "--tests tests/nothing.py: it is not here"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, message):
    command = [sys.executable, "-m", "recollect.benchmarks.first_contact", "--out", str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=steps.REPOSITORY, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: first_contact: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "out" / records.FILE).mkdir(parents=True)
    for out in (tmp_path / "file", tmp_path / "file" / "folder", tmp_path / "out"):
        done = subprocess.run(
            [sys.executable, "-m", "recollect.benchmarks.first_contact", "--out", str(out)],
            capture_output=True,
            text=True,
            cwd=steps.REPOSITORY,
            timeout=60,
        )
        assert done.returncode == 2 and done.stderr.startswith(
            f"error: first_contact: --out {out}: cannot be written: "
        )
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_an_interrupted_parent_ends_its_children_and_writes_its_table(tmp_path, number):
    text = """
import sys
from recollect.benchmarks.first_contact import __main__ as main, processes, steps
wait = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
steps.Plan.steps = lambda plan, part: [processes.Step(part, wait, 60)]
steps.keep_caches = lambda out: None
sys.exit(main.main(["--rehearse", "--only", "probe", "--seconds", "60", "--out", sys.argv[1]]))
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen(
        [*python(text), str(tmp_path / "out")], cwd=steps.REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 20
    while not (child := "".join(log.read_text() for log in tmp_path.glob("*/probe.log"))) and time.monotonic() < end:
        time.sleep(0.05)
    parent.send_signal(number)
    said = parent.communicate(timeout=20)[1]
    assert parent.returncode == 128 + number and f"interrupted by {number.name}" in said and "Traceback" not in said
    assert not os.path.exists(f"/proc/{int(child)}")
    assert f"the parent was interrupted by {number.name}" in (tmp_path / "out" / "first_contact.txt").read_text()


NAME = "linear_recurrence, no decay, b4 t4096 h64 k128 v128"


def contact(folder, name="NVIDIA H100 80GB HBM3", seconds=0.0005, wrong=()):
    folder.mkdir()
    sizes = {"b": 4, "t": 4096, "h": 64, "k": 128, "v": 128}
    lines = [
        {"kind": "begun", "date": "2026-11-26", "command": "--seconds 1"},
        {"kind": "probe", "what": "machine", "device": name, "versions": {"jax": "0.11.2"}},
        {"kind": "probe", "what": "ceilings", "copy_bytes_per_second": 2.8e12, "product_flops_per_second": 7.2e14},
        {
            "kind": "check",
            "what": NAME,
            "operation": "linear_recurrence",
            "variant": "no decay",
            "wrong": list(wrong),
            "same_bits": True,
            "errors": {},
        },
        {
            "kind": "time",
            "what": NAME,
            "form": "pallas_gpu",
            "note": "",
            "sizes": sizes,
            "forward": seconds,
            "floor": {"forward": 0.0004, "both": 0.001},
        },
        {"kind": "peer", "what": "linear_attention b4 t4096 h64 k128 v128", "forward": 0.001, "version": "fla"},
    ]
    (folder / records.FILE).write_text("".join(json.dumps({"step": "s", "at": 0, **line}) + "\n" for line in lines))
    return folder


def test_the_page_compares_measured_predicted_peer_and_what_was_before(tmp_path, capsys):
    first, second = contact(tmp_path / "1"), contact(tmp_path / "2", seconds=0.00045)
    assert device.main(["--from", str(first)]) == 0
    page = capsys.readouterr().out
    row = next(line for line in page.splitlines() if line.startswith(f"| {NAME} "))
    assert "| 0.500 | 1.25 |" in row and "linear_attention 1.000" in row
    answer = next(line for line in page.splitlines() if NAME in line and "0.40 to 0.55" in line)
    assert "| 0.500 | right |" in answer
    assert device.main(["--from", str(first), str(second)]) == 0
    page = capsys.readouterr().out
    assert any(line.startswith(f"| {NAME} | 0.450 | 1.12 | 0.500 |") for line in page.splitlines())
    assert any(NAME in line and "| 0.500 | right |" in line for line in page.splitlines())  # the first kernel answers
    with (first / records.FILE).open("a") as file:  # a block size that was not timed again
        line = {
            "kind": "time",
            "step": "s",
            "what": NAME,
            "form": "pallas_gpu",
            "note": "2 spans",
            "sizes": {},
            "forward": 0.0007,
        }
        file.write(json.dumps(line) + "\n")
    assert device.main(["--from", str(first)]) == 0 and f"| {NAME} 2 spans | 0.700 |" in capsys.readouterr().out
    assert (
        device.main(["--from", str(first), str(second)]) == 0 and f"| {NAME} 2 spans |" not in capsys.readouterr().out
    )


def test_the_first_folder_may_lack_the_machine(tmp_path, capsys):
    folder = tmp_path / "checks"
    folder.mkdir()
    records.write("begun", path=folder / records.FILE, date="2026-11-26")
    assert device.main(["--from", str(folder), str(contact(tmp_path / "1"))]) == 0
    assert capsys.readouterr().out.startswith("# Measured on one NVIDIA H100")


def test_results_are_written_and_wrong_kernels_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device.reporting, "REPOSITORY", tmp_path)
    (tmp_path / "docs").mkdir()
    folder = contact(tmp_path / "1", wrong=["q"])
    assert device.main(["--from", str(folder), "--out", str(tmp_path / "results")]) == 1
    kept = json.loads((tmp_path / "results" / "nvidia-h100-80gb-hbm3" / "first_contact.json").read_text())
    assert kept["device"] == "NVIDIA H100 80GB HBM3" and kept["times"][0]["forward"] == 0.0005
    assert f"WRONG: {NAME}: q" in (tmp_path / "docs" / device.DOCUMENT).read_text()


def test_a_kept_result_stands_for_its_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(device.reporting, "REPOSITORY", tmp_path)
    (tmp_path / "docs").mkdir()
    first, second = contact(tmp_path / "1"), contact(tmp_path / "2", seconds=0.00045)
    trained = {
        "tokens_per_second": 1e5,
        "step_seconds": 1.3,
        "rows": 64,
        "length": 2048,
        "waiting_for_data": 0.0,
        "peak_bytes": 2**34,
    }
    peer = {"version": "torch", "tokens_per_second": 2e5}
    for vocabulary, overrides in (
        (257, ["run.batch_size=64", "--peer-python", "p"]),
        (50304, ["data.tokenizer=bpe:50304"]),
    ):
        row = {**trained, "vocabulary": vocabulary, "overrides": overrides, "peer": peer}
        records.write("pretraining", path=second / records.FILE, what="pretrain.based_360m", **row)
    records.write(
        "tests",
        path=second / records.FILE,
        summary="1 passed, 2 failed",
        failed=["tests/pallas_kernels/test_x.py::y[1]", "z"],
    )
    assert device.main(["--from", str(first), "--out", str(tmp_path / "results")]) == 0
    kept = tmp_path / "results" / "nvidia-h100-80gb-hbm3" / "first_contact.json"
    assert device.gathered([kept]) == json.loads(kept.read_text())
    assert device.gathered([kept, second]) == device.gathered([first, second])
    page = device.document(device.gathered([kept, second]))
    assert (
        "| pretrain.based_360m | 257 | 64 x 2048 | 100,000 |  | 1.300 | 16.0 | 0.00% "
        "| torch: 200,000 tokens per second |" in page
    )
    assert "| pretrain.based_360m | 50,304 | " in page and "- failed: test_x.py::y\n- failed: z\n" in page
    with pytest.raises(UserError, match="H100 80GB HBM3, NVIDIA H200; one kind is needed"):
        device.gathered([kept, contact(tmp_path / "3", name="NVIDIA H200")])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other.json is no result of bench device \(KeyError: 'device'\)"):
        device.gathered([tmp_path / "other.json"])


def test_folders_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(UserError, match=r"bench device: .*nothing.* has no first_contact.jsonl"):
        device.main(["--from", str(tmp_path / "nothing")])
    (tmp_path / "folder" / records.FILE).mkdir(parents=True)
    with pytest.raises(UserError, match=r"bench device: .*folder has no first_contact.jsonl"):
        device.main(["--from", str(tmp_path / "folder")])
    broken = contact(tmp_path / "broken")
    with (broken / records.FILE).open("a") as file:
        file.write('[1]\n{"a": 1}\n{"kind": "time", "step": "s", "what": "x"}\n')
    with pytest.raises(UserError, match=r"broken/first_contact.jsonl: a line of kind 'time' lacks form, sizes"):
        device.main(["--from", str(broken)])
    two = [str(contact(tmp_path / "1")), str(contact(tmp_path / "2", name="NVIDIA H200"))]
    with pytest.raises(UserError, match="NVIDIA H100 80GB HBM3, NVIDIA H200; one kind is needed"):
        device.main(["--from", *two])
