"""Writes files to start from: a mixer, a task or a study of the user's own."""

from __future__ import annotations

import argparse
import keyword
import re
from pathlib import Path

from recollect.configuration.base import UserError
from recollect.configuration.io import replace_text
from recollect.configuration.machine import PROJECT
from recollect.configuration.python_files import is_installed
from recollect.starting import PROGRAM

TEMPLATES = Path(__file__).parent / "templates"
KINDS = ("mixer", "task", "study")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("name", metavar="NAME", help="for example moving_average: its file, function and class")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    name, cls = names_of(options.name)
    if Path.cwd() == PROJECT and (PROJECT / "tests").is_dir():
        files = files_in_checkout(options.kind, name, cls)
        then = {
            "mixer": f"{PROGRAM} train {name}.{name}, and python -m pytest tests/layers -k {cls}",
            "task": f"{PROGRAM} train {name}.{name}",
            "study": f"{PROGRAM} compare {name}.{name}",
        }
    else:
        files = {Path(f"{name}.py"): filled((TEMPLATES / f"{options.kind}.py").read_text(), name, cls)}
        then = {
            "mixer": f"recollect check {name}.py, and recollect train {name}.py",
            "task": f"recollect train {name}.py",
            "study": f"recollect compare {name}.py",
        }
    _write(files)
    print(f"wrote {', '.join(map(str, files))}; next: {then[options.kind]}")
    return 0


def names_of(name: str) -> tuple[str, str]:
    """Returns the names of a file and a class: moving_average and MovingAverage for either of them.

    Raises:
      UserError: it is no name of Python's, or one of a config class.
    """
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    if not name.isascii() or not name.isidentifier() or keyword.iskeyword(snake):
        nearest = re.sub(r"\W+|^(?=\d)", "_", name, flags=re.ASCII).strip("_") or "my_idea"
        nearest = f"my_{nearest}" if keyword.iskeyword(nearest) or nearest[0].isdigit() else nearest
        raise UserError(f"{name!r} cannot be the name of a file and a class: letters, digits and _, such as {nearest}")
    import recollect.training.saved_experiment  # noqa: F401 - all config classes of the project
    from recollect.configuration.names import known_configs

    cls = "".join(part[:1].upper() + part[1:] for part in snake.split("_"))
    if same := [known for known in known_configs() if known.lower() == cls.lower()]:
        module = known_configs()[same[0]].__module__
        raise UserError(f"there is a class {same[0]} already ({module}): class names are unique, such as My{cls}")
    if is_installed(snake):
        why = f"{snake}.py would hide the module {snake} from Python programs in this folder"
        raise UserError(f"{name!r} cannot be the name of a file: {why}; choose another, such as my_{snake}")
    return snake, cls


def filled(template: str, name: str, cls: str) -> str:
    """Returns a template with the names put in."""
    return re.sub(r"\bNew(?:Mixer|Task)", cls, re.sub(r"\bnew_(?:mixer|task|study)\b", name, template))


def files_in_checkout(kind: str, name: str, cls: str) -> dict[Path, str]:
    """Returns what goes where in a checkout: the thing itself, an experiment, a test, and the packages' `__init__.py`
    with the line by which they export it."""
    experiment = PROJECT / "experiments" / f"{name}.py"
    text = filled((TEMPLATES / f"{kind}.py").read_text(), name, cls)
    if kind == "study":
        return {experiment: text}
    folder = Path("layers/mixers" if kind == "mixer" else "data/synthetics")
    package = "recollect.layers" if kind == "mixer" else "recollect.data.synthetics"
    definition, function = _parts(text, name, f"from {package} import {cls}\n", OF_EXPERIMENT[kind])
    test = filled((TEMPLATES / f"{kind}_test.py").read_text(), name, cls)
    inits = _exported_mixer(name, cls) if kind == "mixer" else _exported_task(name, cls)
    return {
        PROJECT / folder / f"{name}.py": definition,
        experiment: function,
        PROJECT / "tests" / folder / f"test_{name}.py": test,
        **inits,
    }


OF_EXPERIMENT = {
    "mixer": ("from recollect.experiments", "from recollect.training"),
    "task": ("from recollect.layers", "from recollect.models", "from recollect.training"),
}
"""Imports of a template that its experiment needs, and not what it defines."""


def _parts(text: str, name: str, line: str, imports: tuple[str, ...]) -> tuple[str, str]:
    """Returns the definition and the experiment of a template; `line` imports the one into the other."""
    before, _, function = text.partition(f"\n\n\ndef {name}(")
    lines = before.splitlines(keepends=True)
    taken = [one for one in lines if one.startswith(imports)]
    docstring = f'"""{function.partition(chr(34) * 3)[2].partition(chr(34) * 3)[0]}"""\n\n'
    needed = "".join(sorted([line, *taken]))
    return "".join(one for one in lines if one not in taken) + "\n", f"{docstring}{needed}\n\ndef {name}({function}"


def _exported_mixer(name: str, cls: str) -> dict[Path, str]:
    init = PROJECT / "layers" / "__init__.py"
    line = f"from recollect.layers.mixers.{name} import {cls}, {cls}Mixer\n"
    return {init: _with_import(init.read_text(), line)}


def _exported_task(name: str, cls: str) -> dict[Path, str]:
    init, data = PROJECT / "data" / "synthetics" / "__init__.py", PROJECT / "data" / "__init__.py"
    line = f"from recollect.data.synthetics.{name} import {cls}\n"
    lazy = data.read_text().replace('"synthetics": "', f'"synthetics": "{cls} ', 1)
    return {init: _with_import(init.read_text(), line), data: lazy}


def _with_import(text: str, line: str) -> str:
    """Returns a text with an import line at its alphabetical place among those of the same package."""
    lines = text.splitlines(keepends=True)
    package = line.rpartition(".")[0] + "."
    same = [place for place, other in enumerate(lines) if other.startswith(package)]
    end = next(place for place in range(same[-1] + 1, len(lines)) if not lines[place].startswith((" ", ")")))
    place = next((place for place in same if lines[place] > line), end)
    return "".join([*lines[:place], line, *lines[place:]])


def _write(files: dict[Path, str]) -> None:
    """Writes new files, and files whose text only grows; nothing where one of the new files is there already."""
    new = [path for path in files if path.name != "__init__.py"]
    if there := [path for path in new if path.exists()]:
        raise UserError(f"{there[0]} is there already, and is not overwritten: choose another name")
    for path, text in files.items():
        try:
            replace_text(path, text)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
