"""GGUF files, read back tensor by tensor with the gguf package, and run by llama.cpp."""

import math

import pytest

from tests.export.huggingface.cases import GGUF
from tests.interop.comparison import PYTHON
from tests.interop.gguf_models import rows

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no gguf here: `make test-interop` sets it up where it can")

BARS = dict.fromkeys(GGUF, 1e-4) | {"kimi-linear": 2e-3}
"""llama.cpp gives the norms of kimi-linear's queries and keys the epsilon of all, 1e-5, not 1e-6."""


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    return {row.model: row for row in rows(tmp_path_factory.mktemp("gguf"))}


@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_file_holds_every_tensor(read, name):
    assert read[name].wrong == []


@pytest.mark.parametrize("name", GGUF)
def test_llama_cpp_generates_from_it(read, name):
    if math.isnan(read[name].error):
        pytest.skip("no xllamacpp, in which llama.cpp comes, for this platform")
    assert read[name].error < BARS[name]
    assert read[name].greedy_equal and read[name].ids_equal
