"""The plan of the code: which package imports which, how long files are, and that what is public is documented."""

import ast
import functools
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ALLOWED = {
    "configuration": set(),
    "pallas_kernels": set(),
    "layers": {"configuration", "pallas_kernels"},
    "models": {"configuration", "layers", "pallas_kernels"},
    "data": {"configuration"},
    "evaluation": {"configuration", "models", "data"},
    "export": {"configuration", "layers", "models", "data"},
    # layers: the context that a model is called with; pallas_kernels: what its operations run on
    # export: parameters that a run begins with
    "training": {"configuration", "pallas_kernels", "layers", "models", "data", "evaluation", "export"},
    "cost": {"configuration", "pallas_kernels", "layers", "models", "data", "training"},
    "serving": {"configuration", "models"},
    "experiments": {"configuration", "layers", "models", "data", "evaluation", "training"},
}
ALLOWED["commands"] = {*ALLOWED, "benchmarks"}
"""Packages that each package may import, beside itself. `main.py`, `benchmarks/` and `tests/` may import everything."""

NO_PACKAGES = {"starting", "__version__"}
"""What is in recollect/ itself."""

DOCUMENTED = ("pallas_kernels", "layers", "models", "training")


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Path from the root -> parsed file, for every Python file that git knows or would (not through links)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    paths = [path for path in listed if (ROOT / path).exists() and not (ROOT / path).is_symlink()]
    return {path: ast.parse((ROOT / path).read_text()) for path in paths}


def imports(tree: ast.Module) -> set[str]:
    """Absolute names of modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "recollect")
    return names


def imported_packages(tree: ast.Module) -> set[str]:
    """Names of this project's packages that a file imports."""
    return {name.split(".")[1] for name in imports(tree) if name.startswith("recollect.")} - NO_PACKAGES


def package_files(package: str) -> list[str]:
    return [path for path in sources() if path.startswith(f"{package}/")]


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_up_the_table(package):
    assert package_files(package), "a package without files is not checked"
    for path in package_files(package):
        crossed = imported_packages(sources()[path]) - {package} - ALLOWED[package]
        allowed = ", ".join(sorted(ALLOWED[package])) or "no other package"
        assert not crossed, f"{path} imports {', '.join(sorted(crossed))}; {package} may import {allowed}"


def test_all_code_imports_recollect():
    """A package imported by its folder's name would exist twice, and would be somebody else's outside the checkout."""
    for path, tree in sources().items():
        assert not {name.split(".")[0] for name in imports(tree)} & {*ALLOWED, "benchmarks", "main"}, path


def test_every_package_is_in_the_table():
    packages = {path.split("/")[0] for path in sources() if path.count("/") and path.endswith("__init__.py")}
    assert packages - {"tests", "benchmarks", "recollect"} == set(ALLOWED)


def test_every_package_is_linked():
    links = {path.name: str(path.readlink()) for path in (ROOT / "recollect").iterdir() if path.is_symlink()}
    assert links == {name: f"../{name}" for name in (*ALLOWED, "benchmarks", "main.py")}
    folders = {
        path.rsplit("/", 1)[0]
        for path in sources()
        if path.count("/") and not path.startswith(("tests/", "recollect/"))
    }
    assert not [folder for folder in folders if not (ROOT / folder / "__init__.py").exists()]


def test_kernels_know_nothing_of_flax_or_configs():
    for path in package_files("pallas_kernels"):
        assert not {name.split(".")[0] for name in imports(sources()[path])} & {"flax", "chz", "optax"}, path


def test_nothing_imports_tensorflow():
    for path, tree in sources().items():
        refused = {"tensorflow", "keras"}
        if not path.startswith(("benchmarks/", "tests/", "export/pytorch/")):  # which run peers, or are exported
            refused |= {"torch", "transformers"}
        assert not {name.split(".")[0] for name in imports(tree)} & refused, path


def test_files_are_small():
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in sources()}
    assert not {path: length for path, length in lengths.items() if length > 400}


@pytest.mark.parametrize("package", DOCUMENTED)
def test_what_is_public_is_documented(package):
    missing = []
    for path in package_files(package):
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
