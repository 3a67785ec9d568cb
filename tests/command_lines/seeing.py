"""Seeing: report, diagnose, figures of compare, boards."""

import json

from tests.evaluation.folders import write_run


def prepare(folder):
    study = folder / "runs" / "study"
    for name, rate, accuracy in (("a", 1e-3, 0.5), ("a", 1e-2, 0.75), ("b", 1e-2, 0.25)):
        write_run(study / f"{name}-{rate}", f"mqar.{name}", rate, accuracy=accuracy)
    write_run(study / "<script>", "<script>alert(1)</script>")
    (write_run(folder / "runs" / "going") / "result.json").unlink()
    (write_run(folder / "runs" / "damaged") / "result.json").write_text("{")
    broken = write_run(folder / "broken" / "config") / "config.json"
    broken.write_text("{")
    (folder / "empty").mkdir()
    (folder / "file.txt").write_text("x")
    (folder / "folder.html").mkdir()
    (folder / "old" / "checkpoints").mkdir(parents=True)
    (folder / "old" / "config.json").write_text(json.dumps({"class": "Experiment"}))


SMALL = "data.vocab_size=32 data.length=16 data.pairs=2 run.steps=2 run.batch_size=8"

LINES = [
    # report
    ("report runs", 0, "runs/report.html (6 runs)"),
    ("report runs/study", 0, "runs/study/report.html (4 runs)"),
    ("report runs/study/a-0.001", 0, "(1 run)"),
    ("report runs/study/a-0.001 runs/study/b-0.01 --out two.html", 0, "two.html (2 runs)"),
    ("report 'runs/study/a*' --out new/folder/globbed.html", 0, "globbed.html (2 runs)"),
    ("report runs/study runs/study/a-0.001 --out once.html", 0, "once.html (4 runs)"),
    ("report runs/study --title 'A <b> title' --out titled.html", 0, "titled.html"),
    ("report runs/study --watch --out watched.html", 0, "watched.html (4 runs)"),
    ("report runs/going --out going.html", 0, "(1 run)"),
    ("report runs/damaged --out damaged.html", 0, "(1 run)"),
    ("report --help", 0, "--watch"),
    ("report", 2, "RUN_OR_STUDY"),
    ("report nowhere", 2, "nowhere names no folder: give run folders, folders that hold runs, or globs of them"),
    ("report mqar.small", 2, "give run folders"),
    ("report empty", 2, "empty holds no run: give run folders"),
    ("report 'nothing*'", 2, "names no folder"),
    ("report broken", 2, "config.json, line 1: not valid JSON"),
    ("report runs --out page.txt", 2, "for example page.html"),
    ("report runs --out page", 2, "for example page.html"),
    ("report runs --out folder.html", 2, "must be a file"),
    ("report runs --out file.txt/page.html", 2, "file.txt"),
    ("report runs --out ''", 2, "is empty; the current folder is ."),
    ("report runs --out .", 2, "for example report.html"),
    ("report ''", 2, "is empty; the current folder is ."),
    ("compare runs/study ''", 2, "is empty; the current folder is ."),
    ("evaluate ''", 2, "is empty; the current folder is ."),
    ("replay ''", 2, "is empty; the current folder is ."),
    ("prepare '' out", 2, "is empty; the current folder is ."),
    ("prepare stdlib ''", 2, "is empty; the current folder is ."),
    (f"train mqar.attention {SMALL} name=", 2, "must be usable as the name of a folder"),
    (f"train mqar.attention {SMALL} name=-x", 2, "must be usable as the name of a folder"),
    (f"train mqar.attention {SMALL} 'name=a\nb'", 2, "must be usable as the name of a folder"),
    (f"train mqar.attention {SMALL} 'run.directory=a\x01b'", 2, "must be printable"),
    ("inspect runs", 2, "runs holds runs, not data; `recollect report runs` shows them"),
    ("inspect runs/study", 2, "`recollect report runs/study` shows them"),
    ("report runs --wach", 2, "--wach"),
    # figures of compare
    ("compare runs/study --out figures", 0, "accuracy_by_learning_rate.png"),
    ("compare runs/study --format svg --out svg", 0, "recall_vs_state.svg"),
    ("compare runs/study --format png,PDF --titles --out both", 0, "recall_vs_state.pdf"),
    ("compare runs/study/b-0.01 --out paged", 0, "paged/report.html"),
    ("compare runs/study --format gif", 2, "there are png, pdf, svg, for example png,svg"),
    ("compare runs/study --format ''", 2, "there are png, pdf, svg"),
    ("compare runs/study --format png,,svg", 2, "'' is none"),
    ("compare mqar.small --format jpg", 2, "there are png, pdf, svg"),
    # diagnose
    ("diagnose --help", 0, "run"),
    ("diagnose", 2, "run"),
    ("diagnose nowhere", 2, "there is no run folder nowhere"),
    ("diagnose mqar.attention", 2, "there is no run folder mqar.attention"),
    ("diagnose runs/study", 2, "not a run folder: it has no checkpoints/"),
    ("diagnose runs/study/a-0.001", 2, "it has no checkpoints/"),
    ("diagnose old", 2, "holds no checkpoint"),
    ("diagnose file.txt", 2, "there is no run folder file.txt"),
    # boards
    (f"train mqar.attention {SMALL} run.wandb=sometimes", 2, "offline"),
    (f"train mqar.attention {SMALL} run.wandb=True", 2, "offline"),
    (f"train mqar.attention {SMALL} run.tensorboard=maybe", 2, "tensorboard"),
    (f"train mqar.attention {SMALL} run.tensorbord=True", 2, "tensorboard"),
]
