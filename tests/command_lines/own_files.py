"""Files of the user's own: train, describe, compare, check, new, --with, and runs that were trained with such files."""

import json

from tests.commands import own_files


def prepare(folder):
    own_files.write(folder)
    one = "from my_file import Experiment, shifted\n\n\ndef only() -> Experiment:\n    return shifted()\n"
    (folder / "one.py").write_text(one)
    (folder / "empty.py").write_text('"""Nothing."""\n')
    (folder / "syntax.py").write_text("x = 1\ndef f(:\n")
    (folder / "broken.py").write_text("x = 1\ny = x / 0\n")
    (folder / "imports.py").write_text("\nimport helper\n")
    (folder / "helper.py").write_text("\n\nraise RuntimeError('not today')\n")
    (folder / "missing.py").write_text("import not_there\n")
    shift = "import chz\nfrom recollect.layers import MixerConfig\n\n\n@chz.chz\nclass Shift(MixerConfig):\n    pass\n"
    (folder / "clash.py").write_text(shift)
    (folder / "notes.txt").write_text("x")
    (folder / "folder.py").mkdir()
    (folder / "taken.py").write_text("mine = 1\n")
    foreign = folder / "foreign"
    (foreign / "checkpoints").mkdir(parents=True)
    entry = {"sha256": "0" * 64, "copy": "user_code/x/0/theirs.py"}
    record = {"load": ["/home/they/theirs.py"], "files": {"/home/they/theirs.py": entry}}
    (foreign / "user_code.json").write_text(json.dumps(record))
    (folder / "damaged" / "checkpoints").mkdir(parents=True)
    (folder / "damaged" / "user_code.json").write_text("{}")


LINES = [
    # FILE.py[:NAME]
    (
        "train my_file.py",
        2,
        "my_file.py defines shifted (experiment), seeds (study), as_dict (study), twice (study)",
    ),
    ("compare my_file.py", 2, "name one study: for example my_file.py:seeds"),
    ("train my_file.py:shiftd", 2, "my_file.py defines no 'shiftd'; did you mean shifted"),
    ("train my_file.py:zzzzz", 2, "it defines shifted (experiment), seeds (study)"),
    ("train my_file.py:seeds", 2, "is a study: use `recollect compare my_file.py:seeds --only shifted`"),
    ("describe my_file.py:as_dict", 2, "use `recollect compare my_file.py:as_dict --only one`"),
    ("compare my_file.py:twice", 2, "my_file.py:twice has two experiments named 'shifted': names are labels"),
    ("train my_file.py:sized", 2, "my_file.py:sized takes arguments (width): a function without is needed"),
    ("train my_file.py:nothing", 2, "my_file.py:nothing gives a NoneType; it must be an Experiment, a Study or a list"),
    ("compare my_file.py:DATA", 2, "my_file.py:DATA gives a OtherKeys; it must be an Experiment"),
    ("train my_file.py:fails", 2, "my_file.py fails at line 88: AttributeError"),
    ("train my_file.py:", 2, "name one experiment: for example my_file.py:shifted"),
    ("train my_fle.py:shifted", 2, "there is no file my_fle.py"),
    ("train folder.py", 2, "there is no file folder.py"),
    ("train empty.py", 2, "empty.py defines no function annotated `-> Experiment` or `-> Study`; name one experiment"),
    ("compare empty.py", 2, "empty.py defines no function annotated `-> Experiment` or `-> Study`; name one study"),
    ("train syntax.py", 2, "syntax.py fails at line 2: SyntaxError"),
    ("describe broken.py", 2, "broken.py fails at line 2: ZeroDivisionError"),
    ("compare imports.py", 2, "helper.py fails at line 3: RuntimeError: not today"),
    ("train missing.py", 2, "missing.py fails at line 1: ModuleNotFoundError: No module named 'not_there'"),
    ("train my_file.py:shifted model.width=7.5", 2, "model.width=7.5"),
    ("train my_file.py:shifted model.stages.0.pattern.1=Shft", 2, "did you mean Shift"),
    ("train my_file.py:shifted ...mistake=array", 2, "returned float32(2, 8, 8); expected MixerOutput with hidden"),
    ("describe my_file.py:shifted ...mistake=raises", 2, "my_file.py fails at line 44: ValueError"),
    ("describe one.py data.pairs=2", 0, "mixers: Shift"),
    # --with
    ("train mqar.attention --with notes.txt", 2, "notes.txt is not a Python file: its name does not end in .py"),
    ("train mqar.attention --with nowhere.py", 2, "there is no file nowhere.py"),
    ("train mqar.attention --with broken.py", 2, "broken.py fails at line 2"),
    ("train mqar.attention --with my_file.py --with clash.py model.stages.0.pattern.1=Shift", 2, "rename one of them"),
    ("train mqar.attention model.stages.0.pattern.1=Shift", 2, "there is no config class named 'Shift'"),
    # runs that were trained with files of somebody's
    (
        "evaluate foreign",
        2,
        "read foreign/user_code/x/0/theirs.py, and allow it with --with foreign/user_c",
    ),
    ("export foreign out", 2, "(sha256 000000000000), which has not been run on this machine"),
    ("generate foreign", 2, "which has not been run on this machine"),
    ("evaluate damaged", 2, "user_code.json is damaged; give the file that the run was trained with as --with FILE"),
    # check
    ("check my_file.py:good --law 1", 0, "holds    law_1_causal"),
    ("check my_file.py:good --law 2 --law 14", 0, "skipped  law_2_streaming: traits.streams is False"),
    ("check my_file.py:good --law law_3_packing", 1, "first at row 0, token 0"),
    ("check my_file.py:bad", 2, "my_file.py, line 40: ShiftMixer.__call__ returned float32(2, 8, 16); expected"),
    ("check my_file.py:best", 2, "defines no mixer 'best'; it defines good, bad, Shift"),
    ("check my_file.py --law law_3_paking", 2, "did you mean law_3_packing"),
    ("check my_file.py --law 99", 2, "there are law_1_causal, law_2_streaming"),
    ("check empty.py", 2, "defines no mixer config: an instance or a subclass of recollect.layers.mixer.MixerConfig"),
    ("check Attention", 2, "a file of yours is needed, FILE.py or FILE.py:MIXER"),
    ("check", 2, "required: FILE.py[:MIXER]"),
    ("check --help", 0, "FILE.py[:MIXER]"),
    # new
    ("new mixer my_average", 0, "wrote my_average.py; next: recollect check my_average.py"),
    ("new task Induction", 0, "wrote induction.py; next: recollect train induction.py"),
    ("new study two_rates", 0, "wrote two_rates.py; next: recollect compare two_rates.py"),
    ("new mixer taken", 2, "taken.py is there already, and is not overwritten: choose another name"),
    (
        "new mixer two-words",
        2,
        "cannot be the name of a file and a class: letters, digits and _, such as two_words",
    ),
    ("new task 3sum", 2, "such as my_3sum"),
    ("new study class", 2, "such as my_class"),
    ("new mixer ../x", 2, "such as x"),
    ("new mixer ''", 2, "such as my_idea"),
    ("new mixer Attention", 2, "there is a class Attention already"),
    (
        "new task MQAR",
        2,
        "there is a class MQAR already (recollect.data.synthetics.mqar): ",
    ),
    (
        "new mixer jax",
        2,
        "jax.py would hide the module jax from Python programs in this folder",
    ),
    ("new study numpy", 2, "choose another, such as my_numpy"),
    ("new study json", 2, "choose another, such as my_json"),
    ("new kernel x", 2, "choose from 'mixer', 'task', 'study'"),
    ("new mixer", 2, "required: NAME"),
]
"""(arguments, exit code, text that the answer contains)."""
