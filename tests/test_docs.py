"""Links of the README and of the documents lead somewhere, and the code of the workflow pages runs."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from recollect.main import main
from recollect.training.batches import StepPipeline

PROJECT = Path(__file__).resolve().parent.parent
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").rglob("*.md"))]
TINY = ["data.vocab_size=32", "data.length=16", "data.pairs=2", "data.evaluation_examples=32", "run.batch_size=16"]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    broken = []
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue  # nothing may be downloaded
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken


def test_papers_are_linked_by_number():
    links = re.findall(r"https://\S+?(?=\))", (PROJECT / "README.md").read_text())
    assert len(links) >= 15
    assert all(re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", link) for link in links)


def test_the_readme_takes_five_minutes():
    assert 150 <= len((PROJECT / "README.md").read_text().splitlines()) <= 180


def test_every_page_is_in_the_navigation():
    navigation = (PROJECT / "mkdocs.yml").read_text()
    pages = [str(page.relative_to(PROJECT / "docs")) for page in PAGES if page.is_relative_to(PROJECT / "docs")]
    assert not [page for page in pages if f": {page}\n" not in navigation]


def code_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / "workflows" / page).read_text(), re.S)


def lines_of(page: str) -> list[list[str]]:
    """Arguments of the lines of a page that run `recollect`."""
    text = (PROJECT / "docs" / "workflows" / page).read_text()
    return [shlex.split(line, comments=True) for line in re.findall(r"^    recollect (.*)$", text, re.M)]


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_workflows_run(tmp_path):
    """In a folder outside the checkout, in the order in which a user would come to them."""
    command = ["-m", "recollect.main"]
    (tmp_path / "my_mixer.py").write_text(code_of("compare.md")[0])
    small = [*TINY, "run.steps=4", "run.steps_per_call=2"]
    out = run(tmp_path, *command, "compare", "mqar.small", "--with", "my_mixer.py", "--only", "small_based", *small)
    assert "small_based" in out
    run(tmp_path, *command, "train", "mqar.attention", *small)
    assert "finished" in run(tmp_path, "-c", code_of("read_a_run.md")[0])
    run(tmp_path, *command, "report", "runs", "--out", "mine.html")
    assert run(tmp_path, "-c", code_of("report.md")[0]).split() == ["9", "runs"]
    assert "layer 1 Attention mixer" in run(tmp_path, "-c", code_of("stuck.md")[0])
    for code in code_of("library.md"):
        run(tmp_path, "-c", code)
    study = code_of("sweep.md")[0] + "\nassert len(windows().experiments) == 4 and len(windows().sweep) == 9\n"
    run(tmp_path, "-c", study)


def test_the_page_about_settings_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [*TINY, "model.width=8", "run.steps_per_call=1", "run.compile_cache=off"]
    first, second = lines_of("settings.md")
    assert main(first) == 0 and "run.steps=1900" in capsys.readouterr().out
    assert main([*second, *small, "run.steps=1"]) == 0
    page = (PROJECT / "docs/workflows/settings.md").read_text()
    settings = [
        override for row in re.findall(r"^\| .* \| (.*) \|$", page, re.M)[1:] for override in row.split("`")[1::2]
    ]
    assert len(settings) == 8
    for setting in settings:
        assert main(["describe", "mqar.attention", "--config", *shlex.split(setting)]) == 0, setting
    assert main(["train", "mqar.attention", "lr=1e-3"]) == 2
    assert "did you mean optimizer.learning_rate=1e-3?" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_about_sweeps_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [*TINY, "model.width=8", "run.steps=1", "run.steps_per_call=1"]
    for line in lines_of("sweep.md")[:2]:
        assert main([*line[:2], *small, *line[2:]]) == 0, line
    assert len(list(Path("runs/mqar.attention,learning_rate,seed").rglob("result.json"))) == 6
    assert len(list(Path("runs/mqar.small").rglob("result.json"))) == 4


def test_the_page_about_own_files_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_study.py").write_text(code_of("my_own_files.md")[0])
    small = [*TINY, "run.steps=2", "run.steps_per_call=2", "...width=16"]
    for line in lines_of("my_own_files.md"):
        shorter = {"check": ["--law", "1", "--law", "3"], "train": small, "compare": small}.get(line[0], [])
        assert main([*line, *shorter]) == 0, line
    assert {path.name for path in Path("runs").iterdir()} == {"moving_average", "my_study", "mqar.small"}
    assert len(list(Path("runs").rglob("user_code.json"))) == 1 + 4 + 4


def test_the_page_about_resuming_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus.txt").write_text("".join(f"def f_{i}(x):\n    return x + {i}\n" for i in range(400)))
    small = ["data.source=corpus.txt", "data.length=32", "model.width=16", "...heads=2", "...window=8"]
    small += [
        "optimizer.warmup=0",
        "run.batch_size=4",
        "run.steps_per_call=1",
        "run.sample_every=0",
        "run.compile_cache=off",
    ]
    cut, again, longer = lines_of("resume.md")
    send = StepPipeline.send

    def interrupted(pipeline, length):
        if pipeline.sent == 2:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C
        return send(pipeline, length)

    with monkeypatch.context() as patched:
        patched.setattr(StepPipeline, "send", interrupted)
        assert main([*cut, *small, "run.steps=4"]) == 130
    assert not Path("runs/text.based/result.json").exists()
    assert main([*again, *small, "run.steps=4"]) == 0
    assert "resumed" in capsys.readouterr().out
    assert main([*longer[:2], *small, "run.steps=6"]) == 0
    result = json.loads(Path("runs/text.based/result.json").read_text())
    assert result["steps"] == 6 and result["extended"]


def test_the_page_about_fine_tuning_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [*TINY, "model.width=16", "run.steps=2", "run.steps_per_call=2", "run.compile_cache=off"]
    for line in lines_of("fine_tune.md"):
        assert main([*line[:2], *(small if line[0] == "train" else []), *line[2:]]) == 0, line
    code = code_of("fine_tune.md")[0].replace('"data.pairs=4"', ", ".join(map(repr, small)))
    exec(code.replace('"run.steps=20"', '"run.steps=2"'), {})
    assert {path.name for path in Path("runs").iterdir()} == {
        "mqar.attention",
        "tuned",
        "frozen",
        "lora",
        "from_python",
    }
    assert Path("exported/model.safetensors").exists()


def test_the_page_about_own_tokens_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    folder = Path("data/shakespeare_char")
    folder.mkdir(parents=True)
    for name in ("train", "val"):
        np.arange(600, dtype=np.uint16).tofile(folder / f"{name}.bin")
    exec(code_of("own_tokens.md")[0], {})
    small = ["model.width=16", "data.length=32", "run.batch_size=2", "run.steps=1", "run.compile_cache=off"]
    for number, line in enumerate(lines_of("own_tokens.md")):
        assert main([*line[:2], *small, "run.sample_every=0", f"run.directory=run{number}", *line[2:]]) == 0, line
