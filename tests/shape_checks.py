"""Checks jaxtyping annotations while tests run: `install()` makes every annotated function of the packages below check
the types and shapes of what it is given and returns.

Functions and methods at the top of a module are wrapped once the module has run, so that annotations may name anything
in it. What a decorator has turned into another object (jax.jit, jax.custom_vjp) is left as it is, as is what carries no
jaxtyping annotation."""

import importlib.abc
import importlib.machinery
import inspect
import sys
from types import FunctionType, ModuleType

import beartype
from jaxtyping import jaxtyped

PACKAGES = ("recollect.layers", "recollect.models", "recollect.pallas_kernels")
DTYPES = ("Array[", "Bool[", "Float[", "Int[", "Integer[", "Key[", "Num[", "PyTree[", "Shaped[")

# An int serves as a float, as for every static type checker.
_typechecker = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def check(module: ModuleType) -> None:
    """Wraps what `module` defines."""
    _wrap(module, module.__name__)
    for value in list(vars(module).values()):
        if inspect.isclass(value) and value.__module__ == module.__name__:
            _wrap(value, module.__name__)


def _wrap(owner: ModuleType | type, module: str) -> None:
    for name, value in list(vars(owner).items()):
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if isinstance(function, FunctionType) and function.__module__ == module and _is_annotated(function):
            setattr(owner, name, jaxtyped(value, typechecker=_typechecker))


def _is_annotated(function: FunctionType) -> bool:
    return any(dtype in str(annotation) for annotation in function.__annotations__.values() for dtype in DTYPES)


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        check(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if not f"{fullname}.".startswith(tuple(f"{package}." for package in PACKAGES)):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Checks modules of `PACKAGES` that are imported from now on."""
    assert not [name for name in sys.modules if name.startswith(PACKAGES)], "imported before the checks"
    sys.meta_path.insert(0, _Finder())
