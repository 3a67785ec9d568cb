"""Exported models in the transformers library, and its models here: logits and greedy generation."""

import pytest

from tests.interop.comparison import CODE, EXPORTED, PYTHON, THEIRS, compared

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="no torch and transformers here: `make test-interop` sets them up where it can"
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return {(row.direction, row.model): row for row in compared(tmp_path_factory.mktemp("models"))}


@pytest.mark.parametrize("name", EXPORTED)
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
