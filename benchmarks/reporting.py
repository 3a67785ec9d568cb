"""What benchmarks share: how their options are read, the line they begin with, and how results are kept, by device."""

import argparse
import datetime
import os
import re
import sys
from pathlib import Path

import jax

from recollect.configuration import UserError, io, machine

REPOSITORY = Path(__file__).resolve().parent.parent


class Parser(argparse.ArgumentParser):
    """Reads the options of `python main.py bench NAME`; what does not fit raises UserError.

    Args:
      name: of the benchmark.
      text: the docstring of its module, whose first paragraph --help shows.
      options: name -> the keyword arguments of `add_argument`.
      file: what --out adds to the folder in which `keep` makes DEVICE/`file`, by default this repository's.
    """

    def __init__(self, name: str, text: str | None, options: dict[str, dict], file: str):
        super().__init__(prog=f"main.py bench {name}", description=(text or "").split("\n\n")[0])
        for option, facts in options.items():
            self.add_argument(f"--{option}", **facts)
        self.add_argument(
            "--out",
            nargs="?",
            type=_folder,
            const=str(REPOSITORY / "benchmarks" / "results"),
            help=f"write OUT/DEVICE/{file}",
        )

    def error(self, message: str) -> None:
        """Raises UserError."""
        raise UserError(f"{self.prog.removeprefix('main.py ')}: {message} (see --help)")

    def parse(
        self,
        arguments: list[str] | None,
        positive: tuple[str, ...] = (),
        known: dict[str, tuple[str, ...]] | None = None,
    ) -> argparse.Namespace:
        """Returns the options.

        Args:
          positive: options that must be so.
          known: of options that hold names, those that there are.
        """
        options = self.parse_args(arguments)
        for name in positive:
            if not getattr(options, name) > 0:
                self.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be positive")
        for option, names in (known or {}).items():
            for unknown in set(getattr(options, option)).difference(names):
                self.error(f"no {option.removesuffix('s')} {unknown!r}; there are {', '.join(names)}")
        return options


def number(default: float, text: str) -> dict:
    """Returns the arguments of an option that takes a number like its default."""
    return {"type": type(default), "default": default, "help": f"{text} (default {default:g})"}


def _folder(text: str) -> str:
    """Returns the name of a folder that exists or can be made; checked before anything is measured."""
    path = Path(text).absolute()
    existing = next(each for each in (path, *path.parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise argparse.ArgumentTypeError(f"{existing} is no folder that can be written to")
    return text


def child_environment(**variables: str) -> dict[str, str]:
    """Returns the environment of a child that imports this checkout, with some variables changed."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **variables,
    }


def print_device() -> None:
    """Prints the device, jax and the day."""
    device = jax.devices()[0]
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}, {datetime.date.today()}")


def describe_machine() -> dict:
    """Returns processor, cores and load average of the last minute."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return {
        "cpu_model": model[1].strip() if model else "unknown processor",
        "cores": machine.cpu_count(),
        "load_average": os.getloadavg()[0],
    }


def device_folder(machine: dict, backend: str, device_kind: str) -> str:
    """Returns the name of the folder of results: the accelerator's kind, or the processor's model and cores."""
    return folder_name(f"cpu {machine['cpu_model']} {machine['cores']} cores" if backend == "cpu" else device_kind)


def folder_name(device: str) -> str:
    """Returns a device's name as a folder has it: lower case, words joined by hyphens."""
    return re.sub(r"[\W_]+", "-", device.lower()).strip("-")


def keep(
    out: str | None,
    file: str,
    name: str,
    arguments: list[str] | None,
    facts: dict,
    *,
    unfinished: str | None = None,
) -> Path | None:
    """Writes `facts`, with the day, the command `bench name arguments`, device, machine and versions, to
    OUT/DEVICE/file, and returns its path; `out` None: nothing.

    Args:
      unfinished: what is being measured when results are kept on the way, so that a crash loses none and is known by
        its place. The file is replaced as a whole each time.
    """
    if out is None:
        return None
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
    path = write_result(out, device_folder(machine, jax.default_backend(), device.device_kind), file, result)
    if unfinished is None:
        print(f"written: {path}")
    return path


def write_result(out: str, folder: str, file: str, result: dict) -> Path:
    """Writes OUT/folder/file as a whole; returns its path."""
    path = Path(out) / folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    io.write_json(path, result, indent=1)
    return path
