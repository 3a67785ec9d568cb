"""`recollect check` as a process of its own, on eight devices."""

import os
import subprocess
import sys

from tests.test_bad_input import PROJECT


def test_nothing_but_the_laws_is_printed(tmp_path):
    """XLA warns about splits that it cannot do without copies; they say nothing about a user's mixer."""
    (tmp_path / "mine.py").write_text("from recollect.layers import Attention\n\nmine = Attention(heads=2)\n")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "JAX_PLATFORMS": "cpu"}
    environment = {
        name: value for name, value in environment.items() if name not in ("XLA_FLAGS", "TF_CPP_MIN_LOG_LEVEL")
    }
    command = [sys.executable, str(PROJECT / "main.py"), "check", "mine.py", "--law", "8"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "holds    law_8_sharded" in done.stdout, done.stderr
    assert all(line.startswith("  check, ") for line in done.stderr.splitlines()), done.stderr
