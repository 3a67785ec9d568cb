"""What users need is importable from its package, and documented there."""

import importlib
import inspect
import pkgutil

import pytest

from recollect.data.batch import DataConfig
from recollect.layers import Mixer, MixerConfig

PACKAGES = (
    "configuration",
    "pallas_kernels",
    "layers",
    "layers.modules",
    "layers.state",
    "models",
    "data",
    "data.synthetics",
    "data.text",
    "data.text.rows",
    "evaluation",
    "training",
    "export",
    "experiments",
)


def classes_in(package: str, base: type) -> set[str]:
    """Names of the public subclasses of `base` that the modules of a package define."""
    root = importlib.import_module(f"recollect.{package}")
    names = set()
    for info in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
        for name, value in vars(importlib.import_module(info.name)).items():
            if inspect.isclass(value) and issubclass(value, base) and value.__module__ == info.name:
                names.add(name)
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_there_and_documented(package):
    module = importlib.import_module(f"recollect.{package}")
    assert module.__doc__ and module.__all__
    if "__getattr__" in vars(module):  # importing a module of the same name would hide a name that is looked up lazily
        assert not {info.name for info in pkgutil.iter_modules(module.__path__)} & set(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        assert not inspect.ismodule(value), f"{package}.{name} is a module"
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{package}.{name} has no docstring"
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


def test_every_mixer_is_public():
    public = set(importlib.import_module("recollect.layers").__all__)
    assert classes_in("layers.mixers", MixerConfig) | classes_in("layers.mixers", Mixer) <= public


def test_every_data_set_is_public():
    assert classes_in("data", DataConfig) <= set(importlib.import_module("recollect.data").__all__)


def test_every_operation_is_public():
    root = importlib.import_module("recollect.pallas_kernels")
    for info in pkgutil.iter_modules(root.__path__):
        operation = importlib.import_module(f"{root.__name__}.{info.name}") if info.ispkg else None
        if operation is not None and any(name.endswith("BACKENDS") for name in vars(operation)):
            functions = {name for name in root.__all__ if getattr(root, name).__module__.startswith(operation.__name__)}
            assert functions, f"{info.name} has no public function in pallas_kernels"
