"""Folders of prepared text, made and compared."""

import filecmp

from recollect.data.text.preparation.prepare import Preparation


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
