"""StableHLO programs in a process that has jax alone: the same logits and greedy tokens as here."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from recollect.configuration import UserError
from recollect.export.stablehlo import export_stablehlo
from recollect.layers import Attention, GatedConvolution, LinearAttention, SlidingWindow
from recollect.layers.modules import LearnedPositions, Rotary, Taylor
from recollect.models import Sampling, generate, repeat
from tests.models.probes import functional
from tests.test_docs import PROJECT

MODELS = {
    "attention": (Attention(heads=2, positions=Rotary()),),
    "based": (
        GatedConvolution(expansion=2),
        LinearAttention(heads=2, feature_dim=3, feature_map=Taylor()),
        SlidingWindow(window=4, heads=2, positions=Rotary()),
    ),
}
PROMPT = [3, 1, 4, 1, 5]


def model_of(name):
    """A small model and its parameters."""
    return functional(width=16, stages=repeat(*MODELS[name], depth=len(MODELS[name])), tied=False)


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """Folder, model and parameters; written by another process, since sizes that are no numbers fail the checks of
    shapes that tests have."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    model, params = model_of(request.param)
    here = f"from tests.export.test_stablehlo import *; model, params = model_of({request.param!r})"
    run(["-c", f"{here}; export_stablehlo(params, model, {str(folder)!r}, maximum_length=24)"], PYTHONPATH=str(PROJECT))
    return folder, model, params


def run(arguments, **environment):
    """Runs Python; returns what it printed."""
    environment |= {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_programs_run_with_jax_alone(exported):
    folder, model, params = exported
    printed = run(["-S", "-c", ALONE, str(folder / "example.py"), *map(str, PROMPT)], PACKAGES=PACKAGES)
    expected = generate(model, params, [PROMPT], 19, Sampling(temperature=0.0))
    assert printed.split() == [str(token) for token in expected[0]]


PACKAGES = json.dumps([path for path in sys.path if path.endswith("site-packages")])
ALONE = """import json, os, runpy, sys
sys.path += json.loads(os.environ["PACKAGES"])
sys.modules["recollect"] = sys.modules["flax"] = sys.modules["safetensors"] = None  # importing one would fail
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_batch_is_free_and_every_platform_is_there(exported):
    folder, model, params = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {sizes["batch"] for sizes in manifest["sizes"].values()} == {"b"} and manifest["vocabulary"] == 23
    weights = dict(np.load(folder / "weights.npz"))
    programs = {
        name: export.deserialize(bytearray((folder / f"{name}.bin").read_bytes())) for name in manifest["sizes"]
    }
    assert all(program.platforms == ("cpu", "cuda", "tpu") for program in programs.values())
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 23, (3, 24)), jnp.int32)
    expected = jax.jit(lambda params, tokens: model.bind(params)(tokens))(params, tokens)
    np.testing.assert_allclose(programs["forward"].call(weights, tokens), expected, atol=1e-5)
    real = jnp.arange(24) >= jnp.array([[14], [20], [2]])
    padded = jnp.where(real, jnp.stack([jnp.roll(row, at) for row, at in zip(tokens, (14, 20, 2), strict=True)]), 0)
    logits, state = programs["prefill"].call(weights, padded, real)
    for row, length in enumerate((10, 4, 22)):
        np.testing.assert_allclose(logits[row], expected[row, length - 1], atol=1e-4)
    following = jnp.stack([tokens[0, 10], tokens[1, 4], tokens[2, 22]])
    logits, _ = programs["step"].call(weights, following, state)
    for row, length in enumerate((10, 4, 22)):
        np.testing.assert_allclose(logits[row], expected[row, length], atol=1e-4)


def test_mistakes(tmp_path):
    model, params = functional(
        width=16, stages=repeat(*MODELS["attention"], depth=1), positions=LearnedPositions(maximum=9)
    )
    for length in (1, 10, 2**31):
        with pytest.raises(UserError, match=f"max_length={length}: must be from 2 to 9, this model's"):
            export_stablehlo(params, model, tmp_path / "out", maximum_length=length)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export_stablehlo(params, model, tmp_path, maximum_length=4)
