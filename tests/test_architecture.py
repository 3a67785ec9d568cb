"""The plan of the house: which room imports which, how long files are, and that what is public is documented."""

import ast
import functools
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ALLOWED = {
    "configuration": set(),
    "pallas_kernels": set(),
    "layers": {"configuration", "pallas_kernels"},
    "models": {"configuration", "layers"},
    "data": {"configuration"},
    "evaluation": {"configuration", "models", "data"},
    # layers: the context that a model is called with; pallas_kernels: what its operations run on
    "training": {"configuration", "pallas_kernels", "layers", "models", "data", "evaluation"},
    "export": {"configuration", "models"},
    "experiments": {"configuration", "layers", "models", "data", "evaluation", "training"},
}
"""Rooms that each room may import, beside itself. `main.py`, `benchmarks/` and `tests/` may import everything."""

DOCUMENTED = ("pallas_kernels", "layers", "models", "training")


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Path from the root -> parsed file, for every Python file that git knows or would."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    return {path: ast.parse((ROOT / path).read_text()) for path in listed if (ROOT / path).exists()}


def imports(tree: ast.Module) -> set[str]:
    """Absolute names of modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module or "")
    return found


def room_files(room: str) -> list[str]:
    return [path for path in sources() if path.startswith(f"{room}/")]


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_up_the_table(room):
    assert room_files(room), "a room without files is not checked"
    others = set(ALLOWED) | {"main", "benchmarks", "tests"}
    for path in room_files(room):
        crossed = {name for name in imports(sources()[path]) if name.split(".")[0] in others - {room} - ALLOWED[room]}
        assert not crossed, (
            f"{path} imports {', '.join(sorted(crossed))}; {room} may import {', '.join(sorted(ALLOWED[room])) or 'no other room'}"
        )


def test_every_package_is_a_room():
    packages = {path.split("/")[0] for path in sources() if path.count("/") and path.endswith("__init__.py")}
    assert packages - {"tests", "benchmarks"} == set(ALLOWED)


def test_every_package_is_installed():
    folders = {
        path.rsplit("/", 1)[0].replace("/", ".")
        for path in sources()
        if path.count("/") and path.endswith("/__init__.py")
    }
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {folder for folder in folders if folder.split(".")[0] not in ("tests", "benchmarks")} == set(listed) - {
        "benchmarks"
    }


def test_kernels_know_nothing_of_flax_or_configs():
    for path in room_files("pallas_kernels"):
        assert not {name.split(".")[0] for name in imports(sources()[path])} & {"flax", "chz", "optax"}, path


def test_nothing_imports_tensorflow():
    for path, tree in sources().items():
        refused = {"tensorflow", "keras"}
        if not path.startswith(("benchmarks/", "tests/")):  # which run peers
            refused |= {"torch", "transformers"}
        assert not {name.split(".")[0] for name in imports(tree)} & refused, path


def test_files_are_small():
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in sources()}
    assert not {path: length for path, length in lengths.items() if length > 400}


@pytest.mark.parametrize("room", DOCUMENTED)
def test_what_is_public_is_documented(room):
    missing = []
    for path in room_files(room):
        tree = sources()[path]
        if tree.body and ast.get_docstring(tree) is None:
            missing.append(path)
        for node in tree.body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and ast.get_docstring(node) is None:
                missing.append(f"{path}: {node.name}")
    assert not missing


def test_list_stays_light():
    """`main.py list` answers at once because nothing heavy is imported at the top of the files that it loads."""
    heavy = {"jax", "flax", "optax", "orbax", "numpy"}
    for path in ("main.py", "experiments/registry.py", "configuration/base.py"):
        top = ast.Module([node for node in sources()[path].body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        assert not {name.split(".")[0] for name in imports(top)} & heavy, path
