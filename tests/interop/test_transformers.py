"""Exported models in the transformers library, and its models here: logits and greedy generation."""

from pathlib import Path

import pytest

from tests.interop.comparison import CODE, EXPORTED, PYTHON, THEIRS, WIDE, compared

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="no torch and transformers here: `make test-interop` sets them up where it can"
)


@pytest.fixture(scope="module")
def rows(request, tmp_path_factory):
    """Rows of the models that are tested, by direction and name."""
    tested = [item for item in request.session.items if item.path == Path(__file__) and "name" in item.callspec.params]
    names = {(item.originalname, item.callspec.params["name"]) for item in tested}
    exported = [name for name in EXPORTED if any(one == name for of, one in names if "imported" not in of)]
    imported = [name for name in THEIRS if (test_an_imported_model_is_the_same_here.__name__, name) in names]
    rows = compared(tmp_path_factory.mktemp("models"), exported, imported)
    return {(row.direction, row.model): row for row in rows}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.wide] * (name in WIDE)) for name in EXPORTED])
def test_an_exported_model_is_the_same_there(rows, name):
    row = rows["exported", name]
    assert row.logits_error < 1e-4 and row.greedy_equal and row.back_exact and row.ids_equal


@pytest.mark.parametrize("name", CODE)
def test_each_mixer_of_the_pytorch_library_is_the_one_here(rows, name):
    assert rows["exported", name].mixers_error < 1e-5


@pytest.mark.parametrize("name", THEIRS)
def test_an_imported_model_is_the_same_here(rows, name):
    row = rows["imported", name]
    assert row.logits_error < 1e-4 and row.greedy_equal
