"""What benchmarks share: how their options are read, the line they begin with, and how results are kept."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

from recollect.benchmarks.machine import describe_machine, device_folder
from recollect.configuration import UserError

REPOSITORY = Path(__file__).resolve().parent.parent


class Parser(argparse.ArgumentParser):
    """Options of `python main.py bench NAME`; what does not fit is a UserError.

    Args:
      name: of the benchmark.
      text: the docstring of its module, whose first paragraph --help shows.
    """

    def __init__(self, name: str, text: str | None):
        super().__init__(prog=f"main.py bench {name}", description=(text or "").split("\n\n")[0])

    def error(self, message: str) -> Any:
        """Raises UserError."""
        raise UserError(f"{self.prog.removeprefix('main.py ')}: {message} (see --help)")

    def add_out(self, file: str) -> None:
        """The option --out: the folder in which `keep` makes DEVICE/`file`, by default this repository's."""
        own = str(REPOSITORY / "benchmarks" / "results")
        self.add_argument("--out", nargs="?", type=_folder, const=own, help=f"write OUT/DEVICE/{file}")


def _folder(text: str) -> str:
    """The name of a folder that is there or can be made, looked at before anything is measured."""
    path = Path(text).absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{there} is no folder that can be written to")
    return text


def say_device() -> None:
    """Prints the device, jax and the day."""
    import jax

    device = jax.devices()[0]
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}, {datetime.date.today()}")


def keep(
    out: str | None,
    file: str,
    name: str,
    arguments: list[str] | None,
    facts: dict[str, Any],
    *,
    unfinished: str | None = None,
) -> None:
    """Writes `facts`, with the day, the command `bench name arguments`, device, machine and versions, to
    OUT/DEVICE/file; `out` None: nothing.

    Args:
      unfinished: what is being measured when results are kept on the way, so that a crash loses none and is known by
        its place. The file is replaced as a whole each time.
    """
    if out is None:
        return
    import jax

    device, machine = jax.devices()[0], describe_machine()
    result = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python main.py bench", name, *(sys.argv[1:] if arguments is None else arguments)]),
        "device": device.device_kind,
        "machine": machine,
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        **({} if unfinished is None else {"unfinished": unfinished}),
        **facts,
    }
    path = Path(out) / device_folder(machine, jax.default_backend(), device.device_kind) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".new")
    written.write_text(json.dumps(result, indent=1) + "\n")
    written.replace(path)
    if unfinished is None:
        print(f"written: {path}")
