"""The notebook: every cell runs, one after another, on small runs, and shows what its text says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_bad_input import runs  # noqa: F401 - a fixture

PROJECT = Path(__file__).resolve().parent.parent
NOTEBOOK = PROJECT / "docs" / "notebooks" / "look_inside.ipynb"


@pytest.mark.more
def test_every_cell_runs(tmp_path, runs):  # noqa: F811
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4 and not any(cell.get("outputs") for cell in notebook["cells"])
    first, *cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert first.startswith("TEXT, RECALL = ")
    checks = [
        "import numpy",
        "numpy.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)",
        "assert abs(numpy.triu(weights[:, 0], 1)).max() == 0",
        "assert len(plt.get_fignums()) == 2",
    ]
    code = [f"TEXT, RECALL = {str(runs / 'text')!r}, {str(runs / 'recall')!r}", *cells, *checks]
    (tmp_path / "cells.py").write_text("\n".join(code))
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "MPLBACKEND": "Agg"}
    command = [sys.executable, "cells.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "['Attention'" in done.stdout and "bytes for 64 tokens" in done.stdout
