"""What a GGUF file cannot hold is refused by the field's name (files themselves: tests/interop/test_gguf.py)."""

import sys
import types

import chz
import pytest

from recollect.configuration import UserError
from recollect.export.gguf_format import export_gguf
from recollect.export.huggingface import Facts
from recollect.models import Canon
from tests.export.huggingface.cases import MODELS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"canon": Canon()}, "model.canon=Canon stands in the way of a Hugging Face export"),
        ({"embedding_scale": 2.0}, "model.embedding_scale=2.0 stands in the way"),
    ],
)
def test_fields_that_no_layout_has_are_refused(tmp_path, monkeypatch, changes, message):
    monkeypatch.setitem(sys.modules, "gguf", types.ModuleType("gguf"))
    with pytest.raises(UserError, match=message):
        export_gguf({}, chz.replace(MODELS["llama"], **changes), tmp_path / "out", facts=Facts("toy"))
    assert not (tmp_path / "out").exists()
