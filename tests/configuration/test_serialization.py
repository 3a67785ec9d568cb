"""Configs to JSON and back, what reading refuses, and the list of differences."""

import json
import subprocess
import sys
from pathlib import Path

import chz
import pytest

from recollect.configuration import UserError, differences, from_json, to_json
from recollect.configuration.python_files import load_definitions
from recollect.layers import LinearAttention
from recollect.layers.modules.mlp import SwiGLU
from recollect.layers.modules.positions import Rotary
from tests.configuration.examples import EXAMPLES, mixed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", EXAMPLES)
def test_back_from_json_it_is_the_same(name):
    config = EXAMPLES[name]
    text = json.dumps(to_json(config))
    again = from_json(json.loads(text))
    assert again == config and type(again) is type(config)
    assert json.dumps(to_json(again)) == text


def test_json_holds_names_and_values_only():
    data = to_json(Rotary(base=10.0))
    fields = {"base": 10.0, "fraction": 1.0, "layout": "half", "scaling": None}
    assert data == {"schema_version": 1, "class": "Rotary", **fields}


def test_whole_numbers_become_floats_where_a_float_belongs():
    data = {"schema_version": 1, "class": "Rotary", "base": 10, "fraction": 1, "layout": "half"}
    read = from_json(data)
    assert read == Rotary(base=10.0) and isinstance(read.base, float)
    data = to_json(mixed())
    data["optimizer"]["clip"] = 2  # float | None
    assert isinstance(from_json(data).optimizer.clip, float)


def test_fields_that_a_file_lacks_take_their_defaults():
    assert from_json({"schema_version": 1, "class": "LinearAttention", "heads": 2}) == LinearAttention(heads=2)


def edited(path: str, value) -> dict:
    data = json.loads(json.dumps(to_json(mixed())))
    *parents, last = path.split(".")
    inner = data
    for name in parents:
        inner = inner[int(name)] if isinstance(inner, list) else inner[name]
    inner[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("schema_version", 2, ("2", "reads 1")),
        ("schema_version", None, ("None",)),
        ("class", "Experimnt", ("Experimnt", "did you mean Experiment")),
        ("class", None, ("not a name",)),
        ("model.class", ["LanguageModel"], ("config.model", "not a name")),
        ("model.width", "64", ("config.model", "width", "int")),
        ("model.width", 64.5, ("config.model", "width", "int")),
        ("model.tied", 1, ("config.model", "tied", "bool")),
        ("model.widht", 64, ("config.model", "widht", "did you mean width")),
        ("model.width", 0, ("width=0",)),
        ("model.mlp", {"hidden": 3}, ("config.model.mlp", "class")),
        ("model.stages.0.pattern", 3, ("config.model.stages.0", "pattern")),
        ("model.stages.0.pattern", [], ("at least one mixer",)),
        ("model.norm", {"class": "SwiGLU"}, ("config.model", "norm")),
        ("model.norm", {"class": "NormConfig"}, ("config.model.norm", "abstract class NormConfig")),
        ("optimizer.learning_rate", None, ("config.optimizer", "learning_rate")),
        ("name", {"class": "Rotary"}, ("name",)),
    ],
)
def test_what_reading_refuses(path, value, words):
    with pytest.raises(UserError) as caught:
        from_json(edited(path, value))
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


@pytest.mark.parametrize("data", [[], "text", None, 3])
def test_a_file_that_is_no_object(data):
    with pytest.raises(UserError, match="one JSON object"):
        from_json(data)


def test_missing_fields_are_named():
    data = to_json(mixed())
    del data["model"]["stages"]
    with pytest.raises(UserError, match=r"config\.model.*stages"):
        from_json(data)


@pytest.mark.parametrize(
    "name",
    [
        "recollect_trap:boom",
        "recollect_trap.boom",
        "lambda: __import__('recollect_trap')",
        "__import__('recollect_trap')",
        "object",
        "",
    ],
)
def test_hostile_class_names_run_nothing(name, tmp_path, monkeypatch):
    (tmp_path / "recollect_trap.py").write_text("raise SystemExit('imported by a config file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for path in ("class", "model.class", "model.mlp.class", "model.stages.0.pattern.0.class"):
        with pytest.raises(UserError):
            from_json(edited(path, name))
    assert "recollect_trap" not in sys.modules


def test_differences_are_dotted_paths():
    before = mixed()
    assert differences(before, before) == {}
    after = chz.replace(
        before, model=chz.replace(before.model, width=64, mlp=None), optimizer=chz.replace(before.optimizer, clip=1.0)
    )
    found = differences(before, after)
    assert found["model.width"] == (32, 64) and found["optimizer.clip"] == (None, 1.0)
    assert found["model.mlp.class"] == ("SwiGLU", None) and found["model.mlp.hidden"] == (8, None)
    assert set(found) == {"model.width", "optimizer.clip"} | {
        f"model.mlp.{name}" for name in ("class", *chz.chz_fields(SwiGLU))
    }
    assert differences(after, before) == {path: (b, a) for path, (a, b) in found.items()}
    longer = chz.replace(before, model=chz.replace(before.model, stages=(*before.model.stages, before.model.stages[1])))
    assert {path.rsplit(".", 1)[0] for path in differences(before, longer)} >= {
        "model.stages.2",
        "model.stages.2.pattern.0",
    }


def test_two_classes_of_one_name_are_an_error():
    code = """
import chz
from recollect.configuration import Config, UserError, config_class
def make():
    @chz.chz(typecheck=True)
    class Twin(Config):
        pass
    return Twin
first = make()
assert config_class("Twin") is first
second = make()
try:
    config_class("Twin")
except UserError as error:
    assert "two config classes are named Twin" in str(error)
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_definitions_of_the_users_own(tmp_path):
    good = tmp_path / "mine.py"
    good.write_text("VALUE = 3\n")
    assert load_definitions(good).VALUE == 3
    bad = tmp_path / "broken.py"
    bad.write_text("x = 1\ny = x / 0\n")
    with pytest.raises(UserError, match=r"broken\.py fails at line 2: ZeroDivisionError"):
        load_definitions(bad)
    with pytest.raises(UserError, match="no file"):
        load_definitions(tmp_path / "none.py")
