"""Labels of runs: what differs, as short as it is clear, and nothing beside it."""

from recollect.evaluation.labels import config_fields, label


def labels(*models):
    configs = [frozenset(config_fields({"model": {"class": "M", **model}}, "model.").items()) for model in models]
    return [label("run", fields, configs) for fields in configs]


def test_what_only_one_class_of_part_has_is_not_named():
    lora = {"class": "LoRA", "alpha": 16.0, "rank": 4, "layers": ["a", "b"]}
    assert labels({"lora": None, "pairs": 2}, {"lora": lora, "pairs": 2}) == ["run", "run [lora=LoRA]"]
    assert labels({"lora": None}, {"lora": lora}, {"lora": {**lora, "rank": 8}}) == [
        "run",
        "run [lora=LoRA, rank=4]",
        "run [lora=LoRA, rank=8]",
    ]
    mixers = [{"class": "Attention", "heads": 2}, {"class": "Based", "heads": 2, "feature_dim": 16}]
    assert labels(*({"mixer": mixer} for mixer in mixers)) == ["run [mixer=Attention]", "run [mixer=Based]"]


def test_values_are_written_as_on_the_command_line():
    assert labels({"tied": True, "text": "a"}, {"tied": False, "text": "b"}) == [
        "run [text=a, tied=True]",
        "run [text=b, tied=False]",
    ]
    assert labels({}, {"window": 8}) == ["run", "run [window=8]"]
    assert labels({"list": []}, {"list": ["x", "y"]}) == ["run [list=]", "run [list=x,y]"]


def test_all_labels_are_different():
    stage = {"stages": [{"class": "Stage", "kernel": kernel} for kernel in (3, 4)]}
    shorter = {"stages": [{"class": "Stage", "kernel": 3}]}
    assert labels(stage, shorter) == ["run [stages.1=Stage]", "run"]
