"""`describe --config`: every field as an override, with what it means; and `describe --no-compile`."""

import chz
import pytest

import recollect.data.text.dataset  # noqa: F401 - config classes of text
from recollect.configuration import apply_overrides, known_configs
from recollect.configuration.field_docs import documented_fields
from recollect.experiments.registry import entries, load
from recollect.main import main
from tests.configuration.examples import EXAMPLES

EXPERIMENTS = [name for name, entry in entries().items() if entry.kind == "experiment"]


def test_every_field_is_listed_with_its_value_and_meaning(capsys):
    assert main(["describe", "mqar.based", "--config", "run.steps=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split(None, 1)[0]: line.split(None, 1)[1] for line in lines}
    assert shown["run.steps=7"] == "optimizer steps"
    assert shown["run.batch_size=64"] == "sequences per step"
    assert shown["model.stages.0.pattern.1.heads=1"].startswith("number of heads")
    assert "Muon" in shown["optimizer=AdamW"] and "SlidingWindow" in shown["model.stages.0.pattern.1=LinearAttention"]
    assert shown["model.remat=none"].endswith("(none, dots, full)")
    assert shown["optimizer.decay_share=0.2"].startswith('"cosine" and "linear" fall')


@pytest.mark.parametrize("config", EXAMPLES.values(), ids=EXAMPLES)
def test_the_lines_are_overrides_that_give_the_same_config(config):
    for field in documented_fields(config):
        assert apply_overrides(config, [f"{field.path}={field.value}"]) == config, field


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiments_fields_are_explained(name):
    fields = documented_fields(load(name, "experiment"))
    assert not [field.path for field in fields if not field.text or len(field.text) > 1000]
    assert len({field.path for field in fields}) == len(fields) > 50


def test_every_config_class_of_the_project_says_what_it_is():
    ours = {name: cls for name, cls in known_configs().items() if cls.__module__.startswith("recollect.")}
    assert len(ours) > 50
    assert not [name for name, cls in ours.items() if chz.chz_fields(cls) and not cls.__doc__]


def test_no_compile_leaves_the_compilation_out(capsys):
    assert main(["describe", "mqar.attention", "--no-compile", "model.width=8"]) == 0
    out = capsys.readouterr().out
    assert "Attention: softmax_attention on xla" in out and "compiles here" not in out


@pytest.mark.parametrize("command", ["train", "compare", "evaluate"])
def test_help_points_to_the_fields(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "describe NAME --config" in " ".join(capsys.readouterr().out.split())
