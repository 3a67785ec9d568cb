"""The page: its data without a browser, and itself in one where there is one."""

import html.parser
import json
import math
import re

import pytest

from recollect.configuration import UserError
from recollect.evaluation.report import write_report
from recollect.evaluation.results import find_runs
from recollect.main import main
from tests.evaluation.folders import study, write_run
from tests.evaluation.report.browser import chromium, probe

HARMFUL = "<script>alert(1)</script><!--"


def model(mixer):
    return {"class": "LanguageModel", "width": 64, "stages": [{"class": "Stage", "pattern": [{"class": mixer}]}]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A study with a harmful name, a run that diverged, one that has not ended, and one whose result is damaged."""
    root = tmp_path_factory.mktemp("report") / "study"
    study(root, {"mqar.based": 0.9, "mqar.attention": 1.0})
    write_run(root / "harm", name=HARMFUL, accuracy=0.3, model=model("Hyena"))
    failure = {"step": 7, "found": "first broken activations: layer 1 Hyena mixer", "folder": "a b/failures/7"}
    write_run(root / "diverged", status="diverged", failure=failure, loss=math.nan, steps=7)
    going = write_run(root / "going", seed=5)
    (going / "result.json").unlink()
    (going / "environment.json").write_text(json.dumps({"python": "3.12", "command": ["main.py", "train", "x y"]}))
    (write_run(root / "damaged") / "result.json").write_text("{")
    # What a failure keeps is no run of its own.
    (root / "diverged" / "failures" / "7").mkdir(parents=True)
    (root / "diverged" / "failures" / "7" / "config.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "new" / "page.html"
    assert main(["report", str(runs), "--out", str(out)]) == 0
    return out


class Reader(html.parser.HTMLParser):
    """Collects a page's elements and the text of its scripts."""

    def __init__(self):
        super().__init__()
        self.elements, self.scripts, self.addresses = [], [], []
        self.inside = None

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        self.inside = tag

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)

    def handle_endtag(self, tag):
        self.inside = None


def data_of(page):
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return json.loads(reader.scripts[0]), reader


def test_the_page_is_one_file_that_asks_for_nothing(page):
    data, reader = data_of(page)
    text = page.read_text(encoding="utf-8")
    assert reader.addresses == ["#main"] and reader.elements.count("script") == 2 and "default-src 'none'" in text
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "{{" not in text.replace("${{", "") and not re.search(r"\bNaN\b|\bInfinity\b", json.dumps(data))


def test_the_page_holds_every_run_and_what_became_of_it(page, runs):
    data, _ = data_of(page)
    by_folder = {run["folder"].removeprefix(f"{runs}/"): run for run in data["runs"]}
    assert len(by_folder) == 12 == len(find_runs([str(runs), str(runs / "harm")], unfinished=True))
    assert by_folder["harm"]["name"] == HARMFUL and HARMFUL not in page.read_text(encoding="utf-8")
    diverged = by_folder["diverged"]
    assert diverged["status"] == "diverged" and "layer 1 Hyena" in diverged["message"] and diverged["loss"] is None
    assert "recollect replay 'a b/failures/7'" in diverged["more"]
    going = by_folder["going"]
    assert (going["status"], going["score"], going["steps"]) == ("not finished", 0.5, 200)
    assert data["architectures"][going["architecture"]]["task"] == 0 == len(data["tasks"]) - 1
    assert going["command"] == "recollect train 'x y'"
    assert by_folder["damaged"]["status"] == "damaged" and "result.json, line 1" in by_folder["damaged"]["message"]
    assert going["evaluations"] == {"steps": [100, 200], "score": [0.1, 0.5], "loss": [0.9, 0.5]}
    assert going["training"]["loss"] == [2.0, 2.0]


def test_the_page_says_where_configs_differ_and_sums_up_what_ended(page):
    data, _ = data_of(page)
    best = data["architectures"][0]  # best first
    assert data["rows"][best["row"]]["label"] == "mqar.attention"
    assert best["best"] == 1.0 and best["settings"] == 2 and best["seeds"] == 2 and best["state_length"] == 128
    differing = {row["path"]: row["values"] for row in data["differences"]}
    assert differing["optimizer.learning_rate"][0] == ["0.001", "0.003"] and "run.seed" in differing
    assert not differing.keys() & {"run.directory", "name", "run.steps"}
    assert {"name": "python", "values": [["3.12", 1]]} in data["environment"]


def test_a_long_run_is_thinned_with_its_last_point(tmp_path):
    write_run(tmp_path / "long", curve=[(step, 0.5) for step in range(1, 40_001)])
    write_report([tmp_path / "long"], tmp_path / "page.html")
    data, _ = data_of(tmp_path / "page.html")
    steps = data["runs"][0]["evaluations"]["steps"]
    assert len(steps) == 30_000 and (steps[0], steps[-1]) == (1, 40_000)


def test_a_broken_line_of_metrics_is_named(tmp_path):
    for name in ("ended", "going"):
        file = write_run(tmp_path / "runs" / name) / "metrics.jsonl"
        file.write_text(f"broken\n{file.read_text()}")
    (tmp_path / "runs" / "going" / "result.json").unlink()
    write_report([tmp_path / "runs"], tmp_path / "page.html")
    runs = data_of(tmp_path / "page.html")[0]["runs"]
    assert [run["status"] for run in runs] == ["finished", "damaged"] and runs[0]["score"] == 0.5
    assert all("metrics.jsonl, line 1: not a line of metrics" in run["message"] for run in runs)
    assert all(run["training"]["steps"] == run["evaluations"]["steps"] == [] for run in runs)


def test_an_unfinished_text_run_has_the_metric_that_it_logged(tmp_path):
    folder = write_run(tmp_path / "ids", "text.ids", data={"class": "Text", "tokenizer": "bytes"}, curve=[])
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 5, "evaluation": {"bits_per_token": 7.5}}) + "\n")
    (folder / "result.json").unlink()
    write_report([folder], tmp_path / "page.html")
    (run,) = data_of(tmp_path / "page.html")[0]["runs"]
    assert (run["metric"], run["score"]) == ("bits_per_token", 7.5)


def test_equal_scores_are_in_the_tables_order_and_chance_is_written_as_in_figures(tmp_path):
    for name in ("c", "a", "b"):
        write_run(tmp_path / f"0{name}", name, accuracy=0.5, chance=0.0625, rate=1e30, status="diverged")
    write_run(tmp_path / "1c", "c", accuracy=0.5, chance=0.0625)
    folders = [tmp_path / "0c", tmp_path / "0b", tmp_path / "0a", tmp_path / "1c"]
    write_report(folders, tmp_path / "page.html")
    data, _ = data_of(tmp_path / "page.html")
    assert [data["rows"][one["row"]]["label"] for one in data["architectures"]] == ["a", "b", "c"]
    assert {run["chance_text"] for run in data["runs"]} == {"6.25 %"}
    assert data["rate_limits"] == [1e-5, pytest.approx(0.1)]


def test_what_cannot_be_reported_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run")
    for argv, message in (
        ([tmp_path / "nowhere"], "names no folder"),
        ([tmp_path / "empty"], "holds no run"),
        ([tmp_path / "run", "--out", tmp_path / "page.txt"], "page.html"),
    ):
        assert main(["report", *map(str, argv)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    with pytest.raises(UserError, match="cannot write"):
        write_report([tmp_path / "run"], tmp_path / "run" / "config.json" / "page.html")


def test_watching_ends_when_all_runs_have(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run")
    result = (folder / "result.json").read_text()
    (folder / "result.json").unlink()
    written = []

    def train_on(seconds):
        written.append(data_of(folder / "report.html")[0])
        (folder / "result.json").write_text(result)

    monkeypatch.setattr("time.sleep", train_on)
    assert main(["report", str(folder), "--watch"]) == 0
    after, _ = data_of(folder / "report.html")
    assert written[0]["refresh"] and written[0]["runs"][0]["status"] == "not finished"
    assert after["refresh"] is None and after["runs"][0]["status"] == "finished"
    assert capsys.readouterr().out.count("report:") == 2


UNITS = """
const scores = [...document.querySelectorAll("#architectures tbody tr")].map(row => row.cells[1].textContent);
const tables = [...document.querySelectorAll("#architectures .scroll, #runs .scroll")];
return {scores, cut: tables.filter(table => table.scrollWidth > table.clientWidth).length};
"""


@pytest.mark.skipif(chromium() is None, reason="no Chromium here (CHROMIUM=, or chromium or google-chrome on PATH)")
def test_units_are_the_metrics_and_long_labels_push_nothing_out(tmp_path):
    models = [{"width": width, **{f"a_long_name_{i}": width for i in range(12)}} for width in (64, 128)]
    for index, model in enumerate(models):
        scored = {"accuracy": None, "chance": None, "bits_per_token": 7.5, "bits_by_slice": {}}
        write_run(tmp_path / "runs" / f"{'long' * 20}{index}", "ids", model=model, curve=[], **scored)
    write_report([tmp_path / "runs"], tmp_path / "page.html")
    found, console = probe(tmp_path / "page.html", UNITS, 1400, tmp_path)
    assert console == [] and found == {"scores": ["7.500 bits/token"] * 2, "cut": 0}


LOOK = """
const wide = [...document.querySelectorAll("body *")].filter(element => {
  const box = element.getBoundingClientRect();
  return box.right > innerWidth + 1 && !element.closest(".scroll, pre, svg");
});
const rows = () => [...document.querySelectorAll("#runs tbody tr")].filter(row => row.offsetParent);
const scores = () => rows().map(row => row.cells[2].textContent);
const all = rows().length;
const head = [...document.querySelectorAll("#runs th button")].find(button => button.textContent === "Score");
head.click();
const rising = scores();
head.click();
const falling = scores();
const box = document.getElementById("filter");
box.value = "based 0.003";
box.dispatchEvent(new Event("input"));
const kept = rows().map(row => row.cells[0].textContent);
const lines = document.querySelectorAll("#figures figure:first-child path.series").length;
const svg = document.querySelector("#figures svg.chart").getBoundingClientRect();
const mark = document.querySelector("#figures figure:first-child path.series").getBoundingClientRect();
const target = document.querySelector("#figures figure:first-child svg");
target.dispatchEvent(new PointerEvent("pointermove", {clientX: mark.right, clientY: mark.top, bubbles: true}));
const tooltip = document.getElementById("tooltip");
const before = getComputedStyle(document.body).backgroundColor;
document.getElementById("theme").click();
return {
  width: innerWidth, overflow: document.documentElement.scrollWidth,
  wide: wide.map(element => element.outerHTML.slice(0, 80)),
  all, rising, falling, kept, lines, chart: svg.width, tooltip: tooltip.hidden ? "" : tooltip.textContent,
  themes: [before, getComputedStyle(document.body).backgroundColor],
  sections: [...document.querySelectorAll("h2")].map(title => title.textContent),
  harmful: document.body.textContent.includes("<script>alert(1)"),
};
"""


@pytest.mark.skipif(chromium() is None, reason="no Chromium here (CHROMIUM=, or chromium or google-chrome on PATH)")
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_in_a_browser(page, tmp_path, width):
    found, console = probe(page, LOOK, width, tmp_path)
    assert console == [] and "error" not in found, (console, found)
    assert found["width"] == width and found["overflow"] <= width and found["wide"] == []
    assert found["sections"] == [
        *("Architectures", "What went wrong", "Sensitivity to the learning rate", "Figures", "Runs"),
        *("Where the configs differ", "Command lines", "Environment"),
    ]
    numbers = [
        [float(score.split()[0]) for score in scores if score != "–"] for scores in (found["rising"], found["falling"])
    ]
    assert found["all"] == 12 and numbers[0] == sorted(numbers[0]) and numbers[1] == numbers[0][::-1] != numbers[0]
    assert found["kept"] == ["mqar.based"] * 2 and found["lines"] == 2  # the figures follow the filter
    assert "step" in found["tooltip"] and 260 <= found["chart"] <= width
    assert found["themes"][0] != found["themes"][1] and found["harmful"]
