"""Folders of prepared text, made and compared."""

import filecmp
import json

from recollect.data.text.preparation.prepare import Preparation
from recollect.data.text.preparation.reader import open_prepared


def quietly(line):
    """Logs nothing in tests that don't look at it."""


def prepared(source, out, tokenizer="bytes", processes=1, log=quietly, **options):
    return Preparation(str(source), tokenizer, **options).into(out, processes, log)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def assert_same(left, right):
    assert files(left) == files(right)
    assert filecmp.cmpfiles(left, right, files(left), shallow=False)[1:] == ([], [])


def texts(part):
    return [part.text(number) for number in range(len(part))]


def prepare_command(capsys, source, out, *options):
    """(exit code, output, error lines) of `main.py prepare`, in this process."""
    from recollect.main import main

    try:
        code = main(["prepare", str(source), str(out), "--processes", "1", *map(str, options)])
    except SystemExit as ended:  # as argparse ends it
        code = ended.code
    captured = capsys.readouterr()
    return code, captured.out, [line for line in captured.err.splitlines() if line.startswith("error: ")]


def texts_of(out):
    """{split: sorted texts} of a prepared folder."""
    opened = open_prepared(str(out))
    return {name: sorted(texts(part)) for name, part in (("train", opened.train), ("held_out", opened.held_out))}


def all_texts_of(out):
    return sorted(text for some in texts_of(out).values() for text in some)


def write_lines(path, *texts, key="text"):
    """Writes JSON lines, one for each text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def refused(capsys, source, out, *options):
    """The one error line of a preparation that ends with exit code 2."""
    code, _, errors = prepare_command(capsys, source, out, *options)
    assert code == 2 and len(errors) == 1, errors
    return errors[0]
