"""Command lines, right and wrong, of the tables in tests/command_lines: a wrong one is answered by exactly one `error:`
line that contains the remedy, and changes no file."""

import importlib
import shlex
from pathlib import Path

import pytest

from recollect import main

TABLES = {
    path.stem: importlib.import_module(f"tests.command_lines.{path.stem}")
    for path in sorted((Path(__file__).parent / "command_lines").glob("*.py"))
    if path.stem != "__init__"
}
TESTS = {
    table if lines is module.LINES else f"{table}: {lines[0][0]}": (table, lines)
    for table, module in TABLES.items()
    for lines in ([module.LINES] if hasattr(module, "IN_ORDER") else [[line] for line in module.LINES])
}
"""Each line is a test, but for tables whose lines use what earlier ones leave: those are one."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Returns the folder of a table, filled once by its `prepare`."""
    folders = {}

    def folder(table):
        if table not in folders:
            folders[table] = tmp_path_factory.mktemp(table)
            getattr(TABLES[table], "prepare", lambda folder: None)(folders[table])
        return folders[table]

    return folder


def files_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("table", "lines"), TESTS.values(), ids=TESTS)
def test_command_line(capsys, monkeypatch, folder_of, table, lines):
    folder = folder_of(table)
    monkeypatch.chdir(folder)
    for line, code, said in lines:
        check(capsys, folder, line, code, said)


def check(capsys, folder, line, code, said):
    """`line` is a text, split as a shell splits it."""
    before = files_in(folder)
    capsys.readouterr()
    try:
        found = main.main(shlex.split(line))
    except SystemExit as stop:
        found = stop.code
    out, err = capsys.readouterr()
    assert found == code, f"{line}: {out}{err}"
    if code != 2:
        assert said in out + err and "error: " not in err, f"{line}: {out}{err}"
        return
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err, f"{line}: {err}"
    assert files_in(folder) == before, line


def test_tables_are_whole():
    """Every table has lines, and none twice."""
    for table, module in TABLES.items():
        assert module.LINES and len(module.LINES) == len(set(module.LINES)), table
        assert all(code in (0, 1, 2) and said.strip() for _, code, said in module.LINES), table
