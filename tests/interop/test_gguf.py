"""GGUF files, read back tensor by tensor with the gguf package."""

import os
import subprocess

import pytest

from recollect.data.tokenizers import ByteTokenizer
from recollect.export.huggingface import Facts, export_huggingface
from tests.export.huggingface.cases import MODELS, parameters
from tests.interop.comparison import PROJECT, PYTHON

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no gguf here: `make test-interop` sets it up where it can")


@pytest.mark.parametrize("name", ["llama, biases, grouped, untied, head_dim", "qwen3"])
def test_a_gguf_file_holds_every_tensor(name, tmp_path):
    export_huggingface(
        parameters(MODELS[name]), MODELS[name], tmp_path / "hf", facts=Facts("toy"), tokenizer=ByteTokenizer()
    )
    side = PROJECT / "tests" / "interop" / "gguf_side.py"
    done = subprocess.run(
        [PYTHON, side, tmp_path / "hf", tmp_path / "out"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"exported: {tmp_path / 'out' / 'model.gguf'}"]
