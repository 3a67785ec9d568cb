"""A day with one's own file, outside the checkout: trained, described and compared by its path; then the code of a run
is loaded again, or what is missing is said."""

import json
import shutil
import sys

import pytest

from recollect import main
from recollect.configuration import known_configs, python_files
from recollect.training.user_code import recorded_files, run_recorded
from tests.commands import own_files


def run(capsys, *arguments):
    """Returns exit code, stdout and stderr of a command line."""
    capsys.readouterr()
    code = main.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the files and a run that was trained with them."""
    folder = tmp_path_factory.mktemp("trained")
    own_files.write(folder)
    assert main.main(["train", f"{folder}/my_file.py:shifted", f"run.directory={folder}/run"]) == 0
    python_files.forget()
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of the run's folder; the files stay where they were when it was trained."""
    shutil.copytree(trained / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    own_files.write(trained)
    python_files.forget()


def test_a_run_records_the_code_it_needs(trained):
    record = json.loads((trained / "run" / "user_code.json").read_text())
    assert record["load"] == [str(trained / "my_file.py")]
    assert record["files"].keys() == {str(trained / "my_file.py"), str(trained / "helpers.py")}
    for path, entry in record["files"].items():
        assert entry["sha256"] == python_files.digest_of(trained / path)
        assert (trained / "run" / entry["copy"]).read_text() == (trained / path).read_text()
    assert not (trained / "__pycache__").exists()


def test_a_run_is_used_without_naming_the_file(capsys, folder):
    code, out, err = run(capsys, "evaluate", "run")
    assert code == 0 and not err and "16x2" in json.loads(out)["accuracy_by_slice"]
    assert run(capsys, "export", "run", "exported")[0] == 0
    assert "OtherKeys" in (folder / "exported" / "config.json").read_text()


@pytest.mark.parametrize("change", ["has changed since", "is no longer there"])
def test_code_that_changed_or_is_gone_is_taken_from_the_copy(capsys, trained, folder, change):
    before = run(capsys, "evaluate", "run")[1]
    if change == "has changed since":
        (trained / "helpers.py").write_text(own_files.HELPERS.replace("0 * x[:, :1]", "x[:, -1:]"))
    else:
        (trained / "helpers.py").unlink()
    code, out, err = run(capsys, "evaluate", "run")
    assert code == 0 and out == before
    assert (
        err.startswith("warning: ") and err.count("\n") == 1 and change in err and "taking the copy run/user_c" in err
    )
    if change == "has changed since":
        then, now = (
            python_files.digest_of(path) for path in (next(folder.rglob("0/helpers.py")), trained / "helpers.py")
        )
        assert f"sha256 {then[:12]} then, {now[:12]} now" in err


def test_code_that_was_never_run_here_is_not_run(capsys, monkeypatch, tmp_path_factory, trained, folder):
    """A run folder from elsewhere: its code is run once the user names it, and from then on."""
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path_factory.mktemp("another machine")))
    for arguments in (["evaluate", "run"], ["export", "run", "out"]):
        code, out, err = run(capsys, *arguments)
        assert code == 2 and not out and err.startswith("error: run was trained with") and err.count("\n") == 1
        assert "which has not been run on this machine: read run/user_code/" in err and "Shift" not in known_configs()
    copy = err.rpartition("--with ")[2].strip()
    assert run(capsys, "evaluate", "run", "--with", copy)[0] == 0
    assert run(capsys, "evaluate", "run")[0] == 0


def test_code_added_to_a_run_folder_is_not_run(capsys, trained, folder):
    """Neither a changed copy, nor a module beside it, nor another file that the record names."""
    (trained / "my_file.py").unlink()
    copy = next(folder.rglob("0/my_file.py"))
    copy.write_text(own_files.MY_FILE + f"\nopen({str(folder / 'ran')!r}, 'w')\n")
    code, _, err = run(capsys, "evaluate", "run")
    assert code == 2 and "its copy" in err.splitlines()[-1] and "is missing or changed" in err
    record = json.loads((folder / "run" / "user_code.json").read_text())
    record["files"][record["load"][0]]["sha256"] = python_files.digest_of(copy)
    (folder / "run" / "user_code.json").write_text(json.dumps(record))
    code, _, err = run(capsys, "evaluate", "run")
    assert code == 2 and "has not been run on this machine" in err
    assert not (folder / "ran").exists()


def test_a_helper_that_the_record_leaves_out_is_not_run(capsys, trained, folder):
    record = json.loads((folder / "run" / "user_code.json").read_text())
    del record["files"][str(trained / "helpers.py")]
    (folder / "run" / "user_code.json").write_text(json.dumps(record))
    (trained / "helpers.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    code, _, err = run(capsys, "evaluate", "run")
    assert code == 2 and "helpers.py" in err and "is not among the files that the run was trained with" in err
    assert not (folder / "ran").exists() and "Shift" not in known_configs()


def test_a_run_without_a_record_asks_for_the_file(capsys, trained, folder):
    (folder / "run" / "user_code.json").unlink()
    code, _, err = run(capsys, "evaluate", "run")
    assert code == 2 and err.count("\n") == 1 and "if it is a class of your own, name its file with --with FILE" in err
    assert run(capsys, "evaluate", "run", "--with", trained / "my_file.py")[0] == 0


def test_a_failed_step_in_the_folder_has_the_runs_code(folder):
    (folder / "run" / "failures" / "10").mkdir(parents=True)
    assert "Shift" not in known_configs()
    run_recorded(folder / "run" / "failures" / "10")
    assert "Shift" in known_configs()


def test_a_damaged_record_is_one_line(capsys, folder):
    for text in ("{}", '{"load": ["x"], "files": {}}', '{"load": 1, "files": []}', "[]"):
        (folder / "run" / "user_code.json").write_text(text)
        code, _, err = run(capsys, "evaluate", "run")
        assert code == 2 and err.count("\n") == 1 and "user_code.json" in err


def test_an_export_and_a_run_that_begins_with_it_have_the_runs_code(capsys, trained, folder):
    assert run(capsys, "export", "run", "exported")[0] == 0
    shutil.rmtree(folder / "run")
    for name in ("helpers.py", "my_file.py"):
        (trained / name).unlink()
    code, out, err = run(capsys, "evaluate", "exported")
    assert code == 0 and "16x2" in out and "taking the copy exported/user_code" in err
    task = ["mqar.attention", "model.width=8", "data.vocab_size=32", "data.length=16", "data.pairs=2"]
    tiny = [*task, "data.evaluation_examples=8", "run.steps=1", "run.batch_size=2"]
    begin = ["train", *tiny, "run.initialize=exported", "run.initialize_mismatch=any"]
    code, out, err = run(capsys, *begin, "run.directory=next")
    assert code == 0 and "begins with the parameters of exported" in out, err
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECOLLECT_CACHE", str(folder / "cache"))  # of a user who never ran that file
        code, _, err = run(capsys, *begin, "run.directory=other")
    assert code == 2 and "which has not been run on this machine" in err and not (folder / "other").exists()


def test_an_export_takes_no_file_from_outside_the_runs_copies(folder):
    record = json.loads((folder / "run" / "user_code.json").read_text())
    (folder / "secret").write_text("x")
    for name, path in enumerate(("../secret", "user_code/../../secret", str(folder / "secret"))):
        record["files"][f"/{name}"] = {"sha256": "0", "copy": path}
    (folder / "run" / "user_code.json").write_text(json.dumps(record))
    names = list(recorded_files(folder / "run"))
    assert len(names) == 3 and all(name.startswith("user_code") and "secret" not in name for name in names)


def test_a_run_that_goes_on_with_changed_code_says_so(capsys, trained, folder):
    (trained / "helpers.py").write_text(own_files.HELPERS + "# changed\n")
    command = ["train", trained / "my_file.py:shifted", f"run.directory={folder}/run"]
    assert run(capsys, *command)[1].count("already finished") == 1
    assert len(list((folder / "run" / "user_code").iterdir())) == 1  # what is not trained is not recorded
    code, _, err = run(capsys, *command, "run.steps=6")
    assert code == 0 and "helpers.py has changed since" in err and "then" in err and "now" in err
    assert len(list((folder / "run" / "user_code").iterdir())) == 2  # the earlier code is kept


def test_a_study_of_ones_own(capsys, folder, trained):
    code, out, err = run(capsys, "compare", trained / "my_file.py:seeds", "--only", "shifted")
    assert code == 0, err
    assert "shifted" in out and len(list((folder / "runs" / "my_file.seeds").rglob("result.json"))) == 2
    assert len(list((folder / "runs").rglob("user_code.json"))) == 2
    code, out, _ = run(capsys, "compare", trained / "my_file.py:as_dict", "--only", "two")
    assert code == 0 and (folder / "runs" / "my_file.as_dict" / "two").is_dir()


def test_describe(capsys, folder, trained):
    code, out, err = run(capsys, "describe", trained / "my_file.py:shifted")
    assert code == 0 and "mixers: Shift" in out, err


def test_with_stays_and_shadows_nothing(capsys, folder, trained):
    """A module beside the file does not replace the standard library's or an installed package of its name."""
    for name in ("json", "chz", "numpy"):
        (trained / f"{name}.py").write_text("raise SystemExit")
    tiny = ["data.vocab_size=32", "data.length=16", "data.pairs=2", "data.evaluation_examples=32", "model.width=8"]
    code, _, err = run(
        *(capsys, "train", "mqar.attention", "model.stages.0.pattern.1=Shift", "--with", trained / "my_file.py"),
        *(*tiny, "run.steps=2", "run.steps_per_call=1", "run.batch_size=4", "run.directory=other"),
    )
    for name in ("json", "chz", "numpy"):
        (trained / f"{name}.py").unlink()
    assert code == 0, err
    assert run(capsys, "evaluate", "other")[0] == 0


def test_two_folders_have_helpers_of_the_same_name(capsys, tmp_path):
    for name, value in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "helpers.py").write_text(f"value = {value}")
        (tmp_path / name / "mine.py").write_text("import helpers\nvalue = helpers.value\n")
        python_files.forget()
        assert python_files.load_definitions(tmp_path / name / "mine.py").value == value
    python_files.forget()
    assert "helpers" not in sys.modules and not [one for one in sys.meta_path if isinstance(one, python_files.UserFile)]


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (
            "array",
            "my_file.py, line 40: ShiftMixer.__call__ returned float32(2, 8, 8); expected MixerOutput with hidden",
        ),
        (
            "width",
            "returned MixerOutput with hidden float32(2, 8, 4); expected MixerOutput with hidden float32(2, 8, 8)",
        ),
        ("raises", "my_file.py fails at line 44: ValueError: Incompatible shapes"),
        ("losses", "returned MixerOutput with losses {'l2': 'float32(8,)'}; expected losses to be a dict of scalars"),
    ],
)
def test_a_mixer_that_returns_something_else_is_one_line(capsys, folder, trained, mistake, said):
    for command in ("train", "describe"):
        name = f"{trained}/my_file.py:shifted"
        code, out, err = run(capsys, command, name, f"...mistake={mistake}", "run.directory=new")
        assert code == 2 and not out and err.count("\n") == 1 and said in err
    assert not (folder / "new").exists()
