"""How much code there is: statements, lines and duplicated lines per package, beside those of another revision.

    python -m recollect.benchmarks.code_size [REVISION]

Statements are nodes of `ast` that are statements, docstrings excepted: comments, blank lines and the way in which a
statement is wrapped do not count. A line is duplicated when it lies in a window of 6 lines (comments, blank lines and
indentation left out) that occurs more than once in the same state. Files in `recollect/` are links, which are read
once, under the name of the folder they lead to. "code" is everything but pallas_kernels/ and tests/.
"""

import argparse
import ast
import io
import subprocess
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

from recollect.configuration import UserError

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 6
COLUMNS = ("files", "lines", "statements", "duplicated")
APART = ("pallas_kernels", "tests")


def main(arguments: list[str] | None = None) -> int:
    """Prints the table of the working tree, beside that of a revision if one is named."""
    parser = argparse.ArgumentParser(prog="code_size", description=__doc__.splitlines()[0])
    parser.add_argument("revision", nargs="?", help="a git revision to compare with, for example HEAD~10")
    revision = parser.parse_args(arguments).revision
    print(format_sizes(sizes(working_tree()), None if revision is None else sizes(sources_of(revision))))
    return 0


def working_tree() -> dict[str, str]:
    """Returns path -> text of every Python file that git tracks or would track, links left out."""
    listed = _git("ls-files", "--cached", "--others", "--exclude-standard", "*.py").decode().splitlines()
    return {
        name: (ROOT / name).read_text() for name in listed if (ROOT / name).is_file() and not (ROOT / name).is_symlink()
    }


def sources_of(revision: str) -> dict[str, str]:
    """Returns path -> text of every Python file of a git revision, links left out.

    Raises:
      UserError: git knows no such revision.
    """
    with tarfile.open(fileobj=io.BytesIO(_git("archive", revision))) as archive:
        return {
            member.name: archive.extractfile(member).read().decode()
            for member in archive
            if member.isfile() and member.name.endswith(".py")
        }


def sizes(sources: dict[str, str]) -> dict[str, Counter[str]]:
    """Returns the counts of COLUMNS by package (the first folder of a path, or the file's name at the top level)."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    duplicated = duplicated_lines(sources)
    for path, text in sources.items():
        counts = {"files": 1, "lines": text.count("\n"), "statements": statements(text), "duplicated": duplicated[path]}
        table[path.split("/")[0]].update(counts)
    return dict(table)


def statements(text: str) -> int:
    """Returns how many statements a file has, without docstrings."""
    return sum(isinstance(node, ast.stmt) and not _is_text(node) for node in ast.walk(ast.parse(text)))


def duplicated_lines(sources: dict[str, str]) -> Counter[str]:
    """Returns by path how many lines lie in a window of WINDOW lines of code that occurs more than once."""
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for path, text in sources.items():
        code = _code_lines(text)
        for start in range(len(code) - WINDOW + 1):
            places[tuple(code[start : start + WINDOW])].append((path, start))
    repeated = {
        (path, start + offset)
        for same in places.values()
        for path, start in (same if len(same) > 1 else ())
        for offset in range(WINDOW)
    }
    return Counter(path for path, _ in repeated)


def format_sizes(now: dict[str, Counter[str]], before: dict[str, Counter[str]] | None = None) -> str:
    """Returns the table: a row per package and one for all code outside APART; each number beside what it was."""
    rows = sorted(now.keys() | (before or {}).keys(), key=lambda name: (name in APART, name))
    code = [name for name in rows if name not in APART]
    lines = [f"{'package':16}" + "".join(f"{column:>22}" for column in COLUMNS)]
    for title, names in [*((name, [name]) for name in rows), ("code", code)]:
        cells = []
        for column in COLUMNS:
            new, old = (sum(each[name][column] for name in names if name in each) for each in (now, before or {}))
            change = f" {new - old:+,}" if column == "statements" else ""
            cells.append(f"{new:,}" if before is None else f"{old:,} -> {new:,}{change}")
        lines.append(f"{title:16}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def _is_text(node: ast.AST) -> bool:
    """Returns whether a node is a statement that is a string alone: a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _code_lines(text: str) -> list[str]:
    """Returns the lines that hold code, without their indentation."""
    lines = [line.strip() for line in text.splitlines()]
    for node in filter(_is_text, ast.walk(ast.parse(text))):
        lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return [line for line in lines if line and not line.startswith("#")]


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise UserError(f"git {' '.join(arguments)}: {done.stderr.decode().strip().splitlines()[-1]}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
