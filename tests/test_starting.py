"""How a program calls itself, and Ctrl-C at any moment of a short run: "stopped" and 130, never a traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recollect import starting

PROJECT = Path(__file__).resolve().parent.parent
SCRIPT = """
import os, signal, sys
sys.argv[0] = {main!r}
from recollect import main, starting
{body}
sys.exit(main.main({arguments!r}))
"""


def started(folder, body, arguments=("describe", "mqar.attention", "--no-compile")):
    """Exit code and errors of the program, with `body` run before its command."""
    script = SCRIPT.format(main=str(PROJECT / "main.py"), body=body, arguments=list(arguments))
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


IN_AN_IMPORT = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("module", ["jax", "recollect.commands.describe", "jax._src.xla_bridge"])
def test_an_interrupt_waits_for_the_import(tmp_path, module):
    assert started(tmp_path, IN_AN_IMPORT.format(module=module)) == (130, "stopped\n")


def test_an_interrupt_before_the_command_reaches_it(tmp_path):
    assert started(tmp_path, "os.kill(os.getpid(), signal.SIGINT)") == (130, "stopped\n")


def test_an_interrupt_after_the_command_is_ignored(tmp_path):
    body = "import atexit\natexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))"
    assert started(tmp_path, body, ["list"]) == (0, "")


def test_only_the_program_takes_the_signal():
    """A library leaves the signals of the program that imports it alone."""
    assert signal.getsignal(signal.SIGINT) is not starting._interrupt and starting.PROGRAM == "recollect"


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.15, 0.3, 0.6, 1.0, 1.5, 2.5])
def test_a_program_stops_at_any_moment(tmp_path, seconds):
    command = [sys.executable, str(PROJECT / "main.py"), "train", "mqar.attention", "run.directory=x"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "stopped" in errors and "Traceback" not in errors, errors
