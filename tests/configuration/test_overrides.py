"""Overrides: what they set, and the one-line errors of those that cannot be set."""

import sys

import chz
import pytest

from recollect.configuration import (
    UserError,
    apply_overrides,
    apply_values,
    config_class,
    differences,
    from_json,
    get_field,
    to_json,
)
from recollect.configuration.field_hints import MEANINGS
from recollect.experiments.registry import load
from recollect.layers import Landmark, LinearAttention, SlidingWindow
from recollect.layers.modules.feature_maps import Hedgehog, Relu, Taylor
from recollect.layers.modules.mlp import GELU
from recollect.layers.modules.positions import LearnedPositions, Rotary
from recollect.models import Stage
from tests.configuration.examples import EXAMPLES, mixed


def changed(*arguments: str) -> dict:
    """Paths and new values after the overrides; every result must also survive JSON."""
    after = apply_overrides(mixed(), list(arguments))
    assert from_json(to_json(after)) == after
    return {path: new for path, (_, new) in differences(mixed(), after).items()}


@pytest.mark.parametrize(
    ("argument", "path", "value"),
    [
        ("optimizer.learning_rate=3e-4", "optimizer.learning_rate", 3e-4),
        ("optimizer.learning_rate=2", "optimizer.learning_rate", 2.0),
        ("optimizer.clip=.5", "optimizer.clip", 0.5),
        ("model.width=64", "model.width", 64),
        ("model.tied=False", "model.tied", False),
        ("model.dtype=bfloat16", "model.dtype", "bfloat16"),
        ("model.mlp.hidden=None", "model.mlp.hidden", None),
        ("model.stages.0.repeats=5", "model.stages.0.repeats", 5),
        ("model.stages.0.pattern.1.block=3", "model.stages.0.pattern.1.block", 3),
        ("model.stages.0.pattern.0.feature_map.epsilon=1", "model.stages.0.pattern.0.feature_map.epsilon", 1.0),
        ("name=3", "name", "3"),
        ("name=a=b", "name", "a=b"),
        ("name=os:system", "name", "os:system"),  # a name is text, whatever it looks like
        ("run.directory=/tmp/x.y", "run.directory", "/tmp/x.y"),
    ],
)
def test_one_field(argument, path, value):
    found = changed(argument)
    assert found == {path: value} and type(found[path]) is type(value)


def test_nothing_given_changes_nothing():
    config = mixed()
    assert apply_overrides(config, []) is config
    assert changed("model.width=32", "model.tied=1") == {}


def test_later_ones_win_and_several_apply():
    assert changed("model.width=64", "run.steps=7", "model.width=128") == {"model.width": 128, "run.steps": 7}


def test_wildcards_reach_every_field_of_the_name():
    assert changed("...heads=4") == {
        f"model.stages.{place}.heads": 4 for place in ("0.pattern.0", "0.pattern.1", "1.pattern.0")
    }
    assert changed("...heads=4", "model.stages.0.pattern.0.heads=8")["model.stages.0.pattern.0.heads"] == 8
    assert changed("...mlp=None")["model.mlp.class"] is None
    after = apply_overrides(mixed(), ["...pattern.0=Landmark", "...block=4"])
    assert [type(mixer) for mixer in after.model.mixers] == [Landmark] * 5


def test_a_swapped_class_keeps_fields_of_the_same_name_and_type():
    said: list[str] = []
    after = apply_overrides(
        mixed(), ["model.stages.0.pattern.0=Landmark", "model.stages.0.pattern.0.block=4"], said.append
    )
    assert after.model.stages[0].pattern == (Landmark(block=4, heads=2), Landmark(block=4))
    (line,) = said
    assert line.startswith("model.stages.0.pattern.0: LinearAttention -> Landmark: keeps heads=2; defaults ")
    assert line.endswith("; without feature_map") and "block" not in line
    assert apply_overrides(mixed(), ["model.mlp=GELU"]).model.mlp == GELU(hidden=8)
    after = apply_overrides(mixed(), ["...feature_map=Hedgehog"])
    assert {mixer.feature_map for mixer in after.model.mixers if isinstance(mixer, LinearAttention)} == {Hedgehog()}
    # What only has its class's default is not kept: the new class has defaults of its own.
    position = "model.stages.0.pattern.1.positions"
    after = apply_overrides(mixed(), [f"{position}=Rotary", "model.stages.0.pattern.1=LinearAttention"])
    assert after.model.stages[0].pattern[1] == LinearAttention(positions=Rotary())


def test_tuples_are_written_whole_longer_and_shorter():
    def pattern(*arguments):
        return apply_overrides(mixed(), list(arguments)).model.stages[0].pattern

    linear, landmark = mixed().model.stages[0].pattern
    path = "model.stages.0.pattern"
    assert pattern(f"{path}=(Landmark, LinearAttention)") == (landmark, linear)  # fields go with their class
    assert pattern(f"{path}=(LinearAttention,)") == pattern(f"{path}=(LinearAttention)") == (linear,)
    longer = pattern(f"{path}=(LinearAttention, Landmark, SlidingWindow(window=8))")
    assert longer == (linear, landmark, SlidingWindow(window=8))
    assert pattern(f"{path}=(SlidingWindow, Landmark)") == (SlidingWindow(heads=2), landmark)
    assert pattern(f"{path}=(LinearAttention, Landmark)", f"{path}.1.heads=4")[1].heads == 4
    stages = apply_overrides(mixed(), ["model.stages=(Stage(pattern=(Landmark(block=4),), repeats=3),)"]).model.stages
    assert stages == (Stage(pattern=(Landmark(block=4),), repeats=3),)
    data = apply_overrides(mixed(), ["data.mixture=(RecallSlice(length=64, pairs=2), RecallSlice(length=32, pairs=4))"])
    assert [(part.length, part.pairs) for part in data.data.mixture] == [(64, 2), (32, 4)]
    assert apply_overrides(data, ["data.mixture=()"]).data.mixture == ()
    assert apply_overrides(mixed(), ["data.mixture=()"]) == mixed()
    assert apply_overrides(mixed(), ["name=(A, B)"]).name == "(A, B)"


def test_none_removes_a_part_and_a_class_adds_it():
    assert apply_overrides(mixed(), ["model.mlp=None"]).model.mlp is None
    assert apply_overrides(mixed(), ["model.positions=LearnedPositions"]).model.positions == LearnedPositions()
    after = apply_overrides(
        mixed(), ["model.stages.0.pattern.1.positions=Rotary", "model.stages.0.pattern.1.positions.base=100"]
    )
    assert after.model.stages[0].pattern[1].positions == Rotary(base=100.0)


def test_tuple_elements_can_be_added():
    after = apply_overrides(mixed(), ["model.stages.1.pattern.1=Landmark", "model.stages.1.pattern.1.block=4"])
    assert after.model.stages[1].pattern == (LinearAttention(), Landmark(block=4))
    after = apply_overrides(
        mixed(), ["data.mixture.0=RecallSlice", "data.mixture.0.length=64", "data.mixture.0.pairs=2"]
    )  # to an empty one
    assert [(part.length, part.pairs) for part in after.data.mixture] == [(64, 2)]


def test_values_of_a_sweep_are_python_objects():
    after = apply_values(
        mixed(),
        {"model.stages.0.pattern.0": LinearAttention(heads=8), "optimizer.learning_rate": 0.5, "run.directory": None},
    )
    assert after.model.stages[0].pattern[0] == LinearAttention(heads=8)  # not the old feature_map
    assert after.optimizer.learning_rate == 0.5
    assert apply_values(mixed(), {"...feature_map": Relu(epsilon=2.0)}).model.stages[1].pattern[0].feature_map == Relu(
        epsilon=2.0
    )
    with pytest.raises(UserError, match="width"):
        apply_values(mixed(), {"model.width": "64"})


WRONG = [
    # (argument, words the one-line message must have beside the argument itself)
    ("model.width=a", ("must be a whole number",)),
    ("model.width=1.5", ("must be a whole number",)),
    ("model.width=", ("must be a whole number",)),
    ("model.stages.0.pattern.1.heads=True", ("must be a whole number",)),
    ("optimizer.learning_rate=fast", ("must be a number",)),
    ("optimizer.learning_rate=None", ("must be a number",)),
    ("optimizer.clip=x", ("must be a number or None",)),
    ("model.tied=maybe", ("must be True or False",)),
    ("model.dtype=float16", ("float32", "bfloat16")),
    ("model.norm=None", ("there are LayerNorm, RMSNorm",)),
    ("model=None", ("LanguageModel",)),
    ("model.mlp=RMSNorm", ("MlpConfig", "RMSNorm")),
    ("model.positions=Rotary", ("LearnedPositions",)),
    ("model.stages.0.pattern.0=AdamW", ("MixerConfig", "AdamW")),
    ("model.stages.0.pattern.1=None", ("is none of its classes; there are Attention",)),
    ("model.stages.0=3", ("no config class",)),
    ("model.stages=3", ("Stage",)),
    ("model.stages.0.pattern.1=Landmrk", ("did you mean", "Landmark")),
    ("model.stages.2=Stage", ("model.stages.2.pattern must be set too",)),
    ("model.widht=3", ("LanguageModel", "did you mean model.width=3?")),
    ("los.z_loss=1e-4", ("did you mean loss.z_loss=1e-4?",)),
    ("modle.width=3", ("Experiment", "did you mean model.width=3?")),
    ("model.stages.0.pattern.0.headz=2", ("LinearAttention", "did you mean model.stages.0.pattern.0.heads=2?")),
    ("model.stages.0.pattern.7.heads=2", ("model.stages.0.pattern has no element '7'",)),
    ("model.stages.-1.repeats=2", ("'-1'",)),
    ("model.stages.0.pattern.3=Landmark", ("has no element '3'", "the next one is model.stages.0.pattern.2")),
    ("model.stages.0.pattern=Landmark", ("a tuple is written (Landmark,)",)),
    (
        "lr=1e-3",
        ("did you mean optimizer.learning_rate=1e-3?", "It has name, task, model, data", "describe NAME --config"),
    ),
    ("batch_size=4", ("did you mean run.batch_size=4?",)),
    ("model.n_layers=4", ("did you mean model.stages.0.repeats=4?",)),
    ("n_heads=4", ("did you mean model.stages.0.pattern.0.heads=4 or ",)),
    ("data.seq_len=64", ("MQAR", "did you mean data.length=64?")),
    ("optimizer=SDG", ("did you mean SGD?", "there are Adafactor, AdamW, Lion, Muon, SGD")),
    ("optimizer=Landmark", ("Landmark is no Optimizer; there are Adafactor, AdamW, Lion, Muon, SGD",)),
    ("model.width.x=3", ("it is a value",)),
    ("...widht=3", ("did you mean model.width=3?",)),
]


@pytest.mark.parametrize(("argument", "words"), WRONG, ids=[argument for argument, _ in WRONG])
def test_mistakes_are_one_line_that_names_path_and_value(argument, words):
    with pytest.raises(UserError) as caught:
        apply_overrides(mixed(), [argument])
    message = str(caught.value)
    assert message.startswith(argument + ":") and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.stages.0.pattern.1.heads=0", "heads=0: must be at least 1"),
        ("model.stages.0.pattern.1.key_heads=3", "key_heads=3: must divide heads=1"),
        ("model.width=-1", "width=-1: must be at least 1"),
        ("model.stages.1.pattern.0=Landmark", "landmark mixers of one model must have the same block"),
        ("optimizer.beta1=1", "beta1=1.0: must be in"),
    ],
)
def test_values_that_a_class_refuses(argument, message):
    with pytest.raises(UserError, match=message):
        apply_overrides(mixed(), [argument])


@pytest.mark.parametrize("argument", ["foo", "=3", "--steps=3", "-x=1", ""])
def test_arguments_that_are_no_overrides(argument):
    with pytest.raises(UserError, match="path=value"):
        apply_overrides(mixed(), [argument])


PATHS = (
    "model.mlp",  # a config stands there
    "model.positions",  # None stands there
    "model.stages.0.pattern.2",  # nothing stands there
    "model.stages.0.pattern.0.feature_map",
    "model.width",
    "...width",
    "...positions",
    "model.dtype",
    "optimizer.clip",
    "model.stages",
    "model",
)


@pytest.mark.parametrize(
    "value",
    ["{}:boom", "{}.boom", "{}:boom[x]", "{}:boom()", "lambda:__import__('{}')", "lambda x: __import__('{}')", "{}:"],
)
def test_a_value_never_imports_or_runs_code(value, tmp_path, monkeypatch):
    trap = "recollect_trap"
    (tmp_path / f"{trap}.py").write_text("raise SystemExit('imported by an override')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for path in PATHS:
        with pytest.raises(UserError) as caught:
            apply_overrides(mixed(), [f"{path}={value.format(trap)}"])
        assert path in str(caught.value) and "\n" not in str(caught.value)
    assert trap not in sys.modules


@pytest.mark.parametrize("name", ["os:system", "recollect.layers.mixers.landmark:Landmark"])
def test_class_names_with_a_module_are_refused(name):
    with pytest.raises(UserError, match="refused"):
        config_class(name)
    assert config_class("Landmark") is Landmark


def test_functions_are_not_classes():
    with pytest.raises(UserError, match=r"model\.positions=normal"):
        apply_overrides(
            mixed(), ["model.positions=normal"]
        )  # a function of the module that the field's class stands in


def test_get_field():
    config = mixed()
    assert get_field(config, "model.stages.0.pattern.1.block") == 4
    assert get_field(config, "model.stages.1.pattern.0.feature_map") == Taylor()
    for path, words in (
        ("model.wdth", "did you mean width"),
        ("model.stages.5", "no field '5'"),
        ("model.width.x", "no field 'x'"),
        ("", "no field ''"),
    ):
        with pytest.raises(UserError, match=words):
            get_field(config, path)


def test_configs_are_frozen_and_typed():
    config = mixed()
    with pytest.raises((AttributeError, chz.data_model.FrozenInstanceError)):
        config.model.width = 3
    with pytest.raises(TypeError, match="heads"):
        LinearAttention(heads="a")


def test_names_of_other_codebases_mean_fields_that_exist():
    configs = [*EXAMPLES.values(), *(load(name, "experiment") for name in ("pretrain.based_30m", "mqar.window"))]
    paths = {path for config in configs for path in chz.beta_to_blueprint_values(config)}
    names = [name for names in MEANINGS.values() for name in names.split()]
    assert not [field for field in MEANINGS if not any(path == field or path.endswith(f".{field}") for path in paths)]
    assert len(names) == len(set(names)) > 100
