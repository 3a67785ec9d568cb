"""What the packages export: derived from their imports, complete, documented."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

from recollect import layers
from recollect.configuration import Config
from recollect.layers import mixers

INTERNAL = (".landmarks", ".adaptation", ".canon_block", ".other_blocks", ".streams", ".value_stack")
PACKAGES = ("recollect.layers", "recollect.layers.modules", "recollect.layers.state", "recollect.models")


@pytest.mark.parametrize("name", PACKAGES)
def test_everything_public_is_exported_and_documented(name):
    package = importlib.import_module(name)
    exported = [getattr(package, name) for name in package.__all__]
    assert all(inspect.getdoc(value) for value in exported if not isinstance(value, tuple))
    folder = mixers if package is layers else package
    for info in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}."):
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            if getattr(value, "__module__", None) != info.name or info.name.endswith(INTERNAL):
                continue  # defined elsewhere, or internal to the model
            if inspect.isclass(value) and not value.__name__.startswith("_"):
                assert value in exported, f"{info.name}.{value.__name__}"


def test_all_follows_from_the_imports():
    assert {config.__name__ for config in layers.MIXERS} <= set(layers.__all__)
    assert {"MIXERS", "SoftmaxAttention", "Context", "zero_padding"} <= set(layers.__all__)
    assert "exported_names" not in layers.__all__ and layers.SoftmaxConfig not in layers.MIXERS
    assert all(issubclass(config, Config) for config in layers.MIXERS)


def test_every_mixer_has_one_row_in_the_documents():
    rows = (Path(__file__).parents[2] / "docs" / "mixers.md").read_text().splitlines()
    for config in layers.MIXERS:
        assert len([row for row in rows if row.startswith(f"| `{config.__name__}` |")]) == 1, config.__name__
