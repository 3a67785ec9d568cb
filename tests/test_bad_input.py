"""What a user may type, and files that may be damaged: one `error:` line and exit code 2, and nothing is lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recollect import main
from recollect.models import memory

PROJECT = Path(__file__).resolve().parent.parent
SMALL = "model.width=16 model.mlp=None run.batch_size=4 run.steps=2 run.steps_per_call=1 run.log_every=1 ...heads=2"
RECALL = [*f"mqar.attention data.vocab_size=32 data.length=16 data.pairs=2 data.evaluation_examples=16 {SMALL}".split()]
TEXT = [*f"text.attention data.length=16 run.evaluate_every=2 {SMALL} model.stages.0.repeats=1".split()]
LONG = "x" * 300


def command(arguments):
    """Returns the exit code of a command line run in this process."""
    try:
        return main.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a recall run and a text run, each of two steps."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "corpus.txt").write_text("def f(x):\n    return x + 1\n\n" * 400)
    assert command(["train", *RECALL, f"run.directory={folder}/recall"]) == 0
    assert command(["train", *TEXT, f"data.source={folder}/corpus.txt", f"run.directory={folder}/text"]) == 0
    return folder


def refused(capsys, arguments):
    """Returns the one line with which a command line was refused."""
    capsys.readouterr()
    assert command(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[:7] for line in lines] == ["error: "], lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["train", *RECALL, "run.steps.=5"], "'run.steps.=5': an override has the form path=value"),
        (["train", *RECALL, "run..steps=5"], "an override has the form path=value"),
        (["train", *RECALL, "run.steps=3000000000"], "run.steps=3000000000: must be at least 1 and at most 2147483647"),
        (["train", *RECALL, "run.stop_at_accuracy=95"], "run.stop_at_accuracy=95.0: must be between 0 and 1"),
        (["train", *RECALL, "run.stop_at_accuracy=nan"], "run.stop_at_accuracy=nan: must be between 0 and 1"),
        (["train", *RECALL, "optimizer.clip=nan"], "error: optimizer.clip=nan: must be positive"),
        (["train", *RECALL, "optimizer.weight_decay=nan"], "error: optimizer.weight_decay=nan: must not be negative"),
        (
            ["train", *RECALL, "optimizer.final_fraction=nan"],
            "error: optimizer.final_fraction=nan: must not be negative",
        ),
        (["train", *RECALL, "run.directory=~nobody-here/x"], "run.directory=~nobody-here/x: "),
        (["train", *RECALL, "run.compile_cache=~nobody-here/x"], "run.compile_cache=~nobody-here/x: "),
        (["train", "--with", "~nobody-here/x.py", *RECALL], "--with ~nobody-here/x.py: "),
        (["train", *RECALL, "name=../../x"], "name='../../x': must be usable as the name of a folder"),
        (
            ["train", *RECALL, "data.vocab_size=100000000000"],
            "vocab_size=100000000000: must be at least 1 and below 2147483648",
        ),
        (["train", *RECALL, "data.evaluation_examples=9999999999"], "evaluation_examples=9999999999: must be"),
        (["train", *RECALL, "model.width=100000000"], "parameters and their gradients would take at least"),
        (
            ["train", *RECALL, "run.batch_size=1000000000"],
            "one activation of 16,000,000,000 tokens would take at least",
        ),
    ],
)
def test_settings_that_cannot_be(capsys, monkeypatch, tmp_path, arguments, reason):
    monkeypatch.setattr(memory, "device_memory", lambda: 2**34)
    monkeypatch.chdir(tmp_path)
    assert reason in refused(capsys, arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", *RECALL, "run.directory=PATH"],
        ["train", *RECALL, "run.compile_cache=PATH"],
        ["train", *RECALL, "--with", "PATH"],
        ["train", *TEXT, "data.source=PATH"],
        ["compare", "mqar.small", "--out", "PATH"],
        ["evaluate", "PATH"],
        ["export", "PATH", "out"],
        ["export", "RUNS/recall", "PATH"],
        ["generate", "PATH"],
        ["replay", "PATH"],
        ["prepare", "PATH", "out"],
        ["prepare", "RUNS/corpus.txt", "PATH"],
        ["prepare", "RUNS/corpus.txt", "out", "--tokenizer", "PATH"],
    ],
)
@pytest.mark.parametrize("path", [LONG, "/proc/1/root/nothing" if os.getuid() else f"{LONG}/below"])
def test_paths_that_the_system_refuses(capsys, monkeypatch, tmp_path, runs, arguments, path):
    monkeypatch.chdir(tmp_path)
    asked = [text.replace("PATH", path).replace("RUNS", str(runs)) for text in arguments]
    assert path in refused(capsys, asked)


def test_a_folder_without_permission(capsys, monkeypatch, tmp_path):
    real = Path.mkdir

    def mkdir(path, *arguments, **options):
        if tmp_path in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    line = refused(capsys, ["train", *RECALL, f"run.directory={tmp_path}/run"])
    assert line == f"error: cannot write to {tmp_path}/run: Permission denied"


def test_a_home_folder_is_found(monkeypatch, tmp_path, capsys, runs):
    monkeypatch.setenv("HOME", str(runs))
    monkeypatch.chdir(tmp_path)
    assert command(["evaluate", "~/recall"]) == 0
    assert command(["train", *RECALL, "run.directory=~/recall"]) == 0
    assert "already finished (with 2 steps, run.steps=2), not trained" in capsys.readouterr().out
    assert command(["train", *RECALL, "run.directory=~/recall", "run.steps=1"]) == 0
    assert "already finished (with 2 steps, run.steps=1), not trained" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "code"), [("import sys\nsys.exit(3)\n", "SystemExit: 3"), ("1 / 0\n", "ZeroDivision")]
)
def test_a_file_of_the_users_that_ends(capsys, tmp_path, text, code):
    (tmp_path / "mine.py").write_text(text)
    assert code in refused(capsys, ["train", *RECALL, "--with", tmp_path / "mine.py"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--seed", "99999999999999999999"], "seed=99999999999999999999: must be between 0 and 2^63 - 1"),
        (["--seed", "-1"], "seed=-1: must be between"),
        (["--temperature", "nan"], "temperature=nan: must be finite and not negative"),
        (["--temperature", "inf"], "temperature=inf: must be finite"),
        (["--top-p", "nan"], "top_p=nan: must be in (0, 1]"),
        (["--tokens", "1000000000"], "generating 1,000,000,000 tokens would take at least"),
        (["--tokens", "100000000000"], "prompt and continuation must be less than 2,147,483,648 tokens"),
        (["--prompt", "a\udc80"], "character 1 of the prompt"),
    ],
)
def test_generation_that_cannot_be(capsys, monkeypatch, runs, options, reason):
    monkeypatch.setattr(memory, "device_memory", lambda: 2**34)
    assert reason in refused(capsys, ["generate", runs / "text", *options])


@pytest.mark.parametrize(
    ("content", "reason"),
    [("[]", "must hold one JSON object"), ("{}", "is damaged"), ("[" * 100_000, "is not valid JSON"), ("\x00", "JSON")],
)
def test_a_damaged_result(capsys, runs, tmp_path, content, reason):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_bytes((runs / "recall" / "config.json").read_bytes())
    (folder / "result.json").write_text(content)
    assert reason in refused(capsys, ["train", *RECALL, f"run.directory={folder}"])
    assert (folder / "result.json").read_text() == content


def test_a_stray_byte_in_the_metrics_loses_its_line_alone(runs, tmp_path):
    shutil.copytree(runs / "recall", tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    assert len(lines) >= 2
    metrics.write_bytes(lines[0][:9] + b"\xff" + lines[0][9:] + b"".join(lines[1:]))
    (tmp_path / "run" / "result.json").unlink()
    assert command(["train", *RECALL, f"run.directory={tmp_path}/run"]) == 0
    assert metrics.read_bytes().splitlines(keepends=True) == lines[1:]


def process(arguments, folder, **options):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), **options.pop("environment", {})}
    line = [sys.executable, "-m", "recollect.main", *arguments]
    return subprocess.Popen(line, cwd=folder, env=environment, stderr=subprocess.PIPE, **options)


def test_a_closed_pipe_never_ends_a_run(tmp_path):
    running = process(["train", *RECALL, "run.directory=run"], tmp_path, stdout=subprocess.PIPE)
    running.stdout.close()
    assert running.wait() == 0 and running.stderr.read() == b""
    assert (tmp_path / "run" / "result.json").exists()


def test_a_full_console_ends_with_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        running = process(["list"], tmp_path, stdout=full)
        assert running.wait() == 2
    assert running.stderr.read() == b"error: standard output: No space left on device\n"


def test_a_console_without_the_characters_shows_escapes(tmp_path):
    text = "print('\\u00e9 \\U0001f600', flush=True)"
    script = f"from recollect.configuration.console import lasting_output\nwith lasting_output(): {text}"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    assert done.stdout == b"\\xe9 \\U0001f600\n"


def test_a_diverged_run_exits_with_3(monkeypatch, capsys):
    from recollect.training import train

    monkeypatch.setattr(train, "train", lambda experiment, log: {"status": "diverged", "steps": 2, "loss": 9.0})
    assert command(["train", *RECALL]) == 3
    assert "status diverged" in capsys.readouterr().out
