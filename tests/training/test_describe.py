"""What a run and `describe` tell of the implementations that will serve, and for which device they are chosen."""

from pathlib import Path

import chz
import jax
import pytest

from configuration import UserError
from layers import LinearAttention, SlidingWindow
from models import LanguageModel, Stage
from pallas_kernels import compilers, dispatch
from tests.training.tiny import tiny
from training.describe import describe
from training.experiment import Mesh
from training.operations import abstract_batch, operations_by_mixer
from training.program import Program

MODEL = LanguageModel(
    width=16, stages=(Stage(pattern=(LinearAttention(), SlidingWindow(window=4)), repeats=2), Stage(pattern=(LinearAttention(),)))
)


EXPERIMENT = chz.replace(tiny(Path("not-made")), model=MODEL)


def test_one_line_a_kind_of_mixer_and_operation():
    lines = operations_by_mixer(MODEL, abstract_batch(EXPERIMENT))
    assert len(lines) == 2
    assert lines[0].startswith("LinearAttention in 3 layers: ") and lines[0].endswith(" on xla")
    assert lines[1] == "SlidingWindow in 2 layers: window_attention on xla"
    with dispatch.preferred_backend("reference"):
        assert operations_by_mixer(MODEL, abstract_batch(EXPERIMENT))[1] == "SlidingWindow in 2 layers: window_attention on reference"


def test_repeats_are_counted_and_only_this_platforms_kernel_is_explained(monkeypatch):
    passed_over = (("pallas_gpu", "it runs on GPUs"), ("pallas_tpu", "k=7 is odd"))

    def hidden(self, tokens, context):
        for _ in range(2):
            dispatch._note(dispatch.Choice("toy", "xla", passed_over))
        dispatch._note(dispatch.Choice("other", "pallas_tpu"))
        return type("Output", (), {"hidden": tokens})

    monkeypatch.setattr("models.language_model.LanguageModelModule.hidden", hidden)
    model = chz.replace(MODEL, stages=MODEL.stages[1:])
    batch = abstract_batch(chz.replace(EXPERIMENT, model=model))
    assert operations_by_mixer(model, batch) == ["LinearAttention: toy on xla, 2 times", "LinearAttention: other on pallas_tpu"]
    with dispatch.aimed_at("tpu", "TPU v5 lite"):
        first, _ = operations_by_mixer(model, batch)
    assert first == "LinearAttention: toy on xla, 2 times (not pallas_tpu: k=7 is odd)"


def test_describe_for_a_target_chooses_for_its_chip():
    try:
        compilers.files("tpu")
    except compilers.NotInstalled as error:
        pytest.skip(str(error))
    said = []
    model = LanguageModel(width=16, stages=(Stage(pattern=(SlidingWindow(window=4),)),))
    describe(chz.replace(EXPERIMENT, model=model), target="tpu:v6e:2x2", say=said.append)
    place = said.index("operations on TPU v6 lite")
    assert said[place + 1].startswith("  SlidingWindow: window_attention on ")
    assert any("compiles for tpu:v6e:2x2" in line for line in said)
    with pytest.raises(UserError, match="libtpu knows no slice 'v6e:3x7'"):
        describe(EXPERIMENT, target="tpu:v6e:3x7")


def test_describe_without_libtpu(tmp_path, monkeypatch):
    monkeypatch.setenv("RECOLLECT_LIBTPU", str(tmp_path))
    with pytest.raises(UserError, match="`make libtpu` installs it"):
        describe(EXPERIMENT, target="tpu:v5e:2x2")


def test_a_program_under_a_mesh_tells_its_operations():
    seen = []

    def probe(x):
        seen.append(dict(jax.sharding.get_abstract_mesh().shape))
        return x

    for mesh in (Mesh(), Mesh(data=2, tensor=2)):
        program = Program(chz.replace(EXPERIMENT, run=chz.replace(EXPERIMENT.run, mesh=mesh)))
        whole = None if program.mesh is None else jax.sharding.NamedSharding(program.mesh, jax.sharding.PartitionSpec())
        assert program._jit("probe", probe)(jax.device_put(1, whole)) == 1
    assert seen == [{}, {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 1}]
