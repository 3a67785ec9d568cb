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


def kernel_modules() -> set[str]:
    """Modules of this package that import Pallas or Mosaic when they are imported."""
    imports = re.compile(
        r"^(from jax\.experimental import pallas|(from|import) jax\.experimental\.pallas)", re.MULTILINE
    )
    folder = ROOT / "pallas_kernels"
    return {
        "recollect.pallas_kernels." + ".".join(path.relative_to(folder).with_suffix("").parts)
        for path in folder.rglob("*.py")
        if imports.search(path.read_text())
    }


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


def test_every_operation_is_importable_from_the_package():
    for name in recollect.pallas_kernels.__all__:
        operation = getattr(recollect.pallas_kernels, name)
        assert callable(operation) and operation.__doc__, name
