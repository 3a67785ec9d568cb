"""Kernels are imported when they are chosen: none by `import recollect.layers`, none by a training run on a CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import recollect.pallas_kernels

ROOT = Path(__file__).resolve().parents[2]

LAYERS = "import recollect.layers"
RUN = """
from recollect.main import main
assert main(["train", "mqar.based", "run.steps=1", "run.directory=" + {folder!r}]) in (0, None)
"""


PALLAS = re.compile(r"^(from jax\.experimental import pallas|(from|import) jax\.experimental\.pallas)", re.MULTILINE)
CONTEXT = re.compile(r"^\w+.* = jax\.make_user_context\(", re.MULTILINE)


def modules_with(pattern: re.Pattern[str]) -> set[str]:
    """Modules of this package whose text matches."""
    folder = ROOT / "pallas_kernels"
    names = {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        for path in folder.rglob("*.py")
        if pattern.search(path.read_text())
    }
    return {f"recollect.pallas_kernels.{name}" for name in names}


def kernel_modules() -> set[str]:
    """Modules of this package that import Pallas or Mosaic when they are imported."""
    return modules_with(PALLAS)


def imported(code: str) -> set[str]:
    """Modules that a fresh process holds after it ran this code."""
    report = "import sys; print('MODULES', *sorted(sys.modules))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("what", ["layers", "run"])
def test_no_kernel_is_imported_on_a_cpu(what, tmp_path):
    assert "recollect.pallas_kernels.mosaic_gpu" in kernel_modules() and len(kernel_modules()) > 15
    modules = imported(LAYERS if what == "layers" else RUN.format(folder=str(tmp_path)))
    assert not modules & kernel_modules()
    assert not {name for name in modules if name.startswith("jax.experimental.pallas")}


def test_what_jax_keeps_programs_by_is_complete_before_the_first_is_traced():
    # A context made later, while a program is traced, has every program traced and compiled once more.
    contexts = modules_with(CONTEXT)
    assert "recollect.pallas_kernels.tuning" in contexts and contexts <= imported(LAYERS)


def test_every_operation_is_importable_from_the_package():
    for name in recollect.pallas_kernels.__all__:
        operation = getattr(recollect.pallas_kernels, name)
        assert callable(operation) and operation.__doc__, name
