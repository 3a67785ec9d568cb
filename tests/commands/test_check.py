"""`recollect check`: which laws hold for a user's mixers, which are skipped and why, and the first input of one that
fails."""

import pytest

from recollect.configuration import python_files
from tests.commands import own_files
from tests.commands.test_own_files import run


@pytest.fixture
def file(tmp_path, monkeypatch):
    own_files.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "my_file.py"
    python_files.forget()


LAWS = ["--law", "1", "--law", "law_2_streaming", "--law", "14", "--law", "3"]


def test_what_holds_is_skipped_and_fails(capsys, file):
    code, out, err = run(capsys, "check", "my_file.py:good", *LAWS)
    assert code == 1 and not err
    assert out.splitlines()[0] == "good: Shift(mistake='none')"
    assert "  holds    law_1_causal\n" in out
    assert "  skipped  law_2_streaming: traits.streams is False\n" in out
    assert "  skipped  law_14_maximum_length: traits.maximum_length is None\n" in out
    said = (
        "the document of segment 2 (row 0, tokens 5 to 35) differs from the same tokens alone: first at row 0, token 0"
    )
    fails = "  FAILS    law_3_packing: A document's outputs are the same in a packed row and alone. "
    assert f"{fails}{said}" in out
    assert "  1 hold, 2 skipped, 1 fail (" in out


def test_every_mixer_of_a_file_is_checked(capsys, file):
    file.write_text(
        own_files.MY_FILE.replace('good, bad = Shift(), Shift(mistake="array")', "first = second = Shift()")
    )
    code, out, _ = run(capsys, "check", "my_file.py", "--law", "1")
    assert code == 0 and out.count("holds    law_1_causal") == 2 and "second: Shift" in out
    code, out, _ = run(capsys, "check", "my_file.py:Shift", "--law", "1")
    assert code == 0 and out.startswith("Shift: Shift(")


def test_code_that_raises_in_a_law_fails_it(capsys, file):
    line = '        if self.config.mistake == "array"'
    file.write_text(own_files.MY_FILE.replace(line, f"        assert x.dtype != 'bfloat16'\n{line}"))
    code, out, _ = run(capsys, "check", "my_file.py:good", "--law", "7", "--law", "1")
    assert code == 1 and "holds    law_1_causal" in out and "FAILS    law_7_bf16" in out


def test_a_wrong_shape_is_one_line_before_any_law(capsys, file):
    code, out, err = run(capsys, "check", "my_file.py:bad")
    assert code == 2 and err.count("\n") == 1 and "law" not in out
    assert "my_file.py, line 40: ShiftMixer.__call__ returned float32(2, 8, 16); expected MixerOutput" in err
