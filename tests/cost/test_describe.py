"""What a run and `describe` tell of the implementations that will serve, and for which device they are chosen."""

from pathlib import Path

import chz
import jax
import pytest

from recollect.configuration import UserError
from recollect.cost.describe import describe
from recollect.layers import LinearAttention, SlidingWindow
from recollect.models import LanguageModel, Stage
from recollect.pallas_kernels import compilers, dispatch
from recollect.training.experiment import Mesh
from recollect.training.monitoring.run_log import operations_by_mixer
from recollect.training.step import Program
from tests.training.tiny import tiny

MODEL = LanguageModel(
    width=16,
    stages=(
        Stage(pattern=(LinearAttention(), SlidingWindow(window=4)), repeats=2),
        Stage(pattern=(LinearAttention(),)),
    ),
)


EXPERIMENT = chz.replace(tiny(Path("not-made")), model=MODEL)


def test_one_line_a_kind_of_mixer_and_operation():
    lines = operations_by_mixer(MODEL, EXPERIMENT.data.batch_shapes(EXPERIMENT.run.batch_size))
    assert len(lines) == 2
    assert lines[0].startswith("LinearAttention in 3 layers: ") and lines[0].endswith(" on xla")
    assert lines[1] == "SlidingWindow in 2 layers: softmax_attention on xla"
    with dispatch.preferred_backend("reference"):
        assert (
            operations_by_mixer(MODEL, EXPERIMENT.data.batch_shapes(EXPERIMENT.run.batch_size))[1]
            == "SlidingWindow in 2 layers: softmax_attention on reference"
        )


def test_repeats_are_counted_and_only_this_platforms_kernel_is_explained(monkeypatch):
    passed_over = (("pallas_gpu", "it runs on GPUs"), ("pallas_tpu", "k=7 is odd"))

    def hidden(self, tokens, context):
        for _ in range(2):
            dispatch._record.get().append(dispatch.Choice("toy", "xla", passed_over))
        dispatch._record.get().append(dispatch.Choice("other", "pallas_tpu"))
        return type("Output", (), {"hidden": tokens})

    monkeypatch.setattr("recollect.models.language_model.LanguageModelModule.hidden", hidden)
    model = chz.replace(MODEL, stages=MODEL.stages[1:])
    batch = EXPERIMENT.data.batch_shapes(EXPERIMENT.run.batch_size)
    assert operations_by_mixer(model, batch) == [
        "LinearAttention: toy on xla, 2 times",
        "LinearAttention: other on pallas_tpu",
    ]
    with dispatch.aimed_at("tpu", "TPU v5 lite"):
        first, _ = operations_by_mixer(model, batch)
    assert first == "LinearAttention: toy on xla, 2 times (not pallas_tpu: k=7 is odd)"


def _there(compiler):
    try:
        compilers.files(compiler)
    except compilers.NotInstalled as error:
        pytest.skip(str(error))


def test_describe_for_a_slice_of_tpus():
    _there("tpu")
    said = []
    model = LanguageModel(width=16, stages=(Stage(pattern=(SlidingWindow(window=4),), repeats=3),))
    run = chz.replace(EXPERIMENT.run, mesh=Mesh(data=2, fsdp=2))
    describe(chz.replace(EXPERIMENT, model=model, run=run), target="tpu:v6e:2x2", log=said.append)
    place = said.index("operations on TPU v6 lite")
    assert said[place + 1].startswith("  SlidingWindow: softmax_attention on ") or "in 3 layers" in said[place + 1]
    assert any(line.startswith("training step of batch 16 compiles for tpu:v6e:2x2, 4 devices (") for line in said)
    assert any(
        "memory per device: arguments" in line and line.endswith("of the 32.0 GiB of a TPU v6e: fits") for line in said
    )
    gathered = next(line.split() for line in said if line.startswith("    all-gather "))
    assert int(gathered[1]) >= 3  # parameters of every layer at least
    assert any(line.startswith("  roofline (data-sheet peaks, not measured): products ") for line in said)
    assert any(line.startswith("  the compiler's estimate: ") for line in said)
    with pytest.raises(UserError, match="libtpu knows no slice 'v6e:3x7'"):
        describe(EXPERIMENT, target="tpu:v6e:3x7")
    eight = chz.replace(EXPERIMENT, run=chz.replace(EXPERIMENT.run, mesh=Mesh(data=8)))
    with pytest.raises(UserError, match=r"run\.mesh asks for 8 devices; the target has 4"):
        describe(eight, target="tpu:v6e:2x2", log=said.append)


def test_describe_for_an_h100():
    _there("cuda")
    said = []
    model = LanguageModel(width=64, stages=(Stage(pattern=(SlidingWindow(window=4),)),), dtype="bfloat16")
    describe(chz.replace(EXPERIMENT, model=model), target="h100", log=said.append)
    assert "operations on NVIDIA H100 80GB HBM3" in said
    assert any(line.startswith("training step of batch 16 compiles for h100 (") for line in said)
    assert any("of the 79.1 GiB of a H100: fits" in line for line in said)
    products = next(line.split() for line in said if line.startswith("  products: "))
    assert float(products[1].replace(",", "")) >= 0 and products[2] == "TFLOP"
    assert "  collectives: none" in said


@pytest.mark.parametrize("target", ["h200", "tpu:v5e", "gpu:h100:1", ""])
def test_targets_that_are_none(target):
    with pytest.raises(UserError, match="the form is tpu:GENERATION:TOPOLOGY, for example tpu:v5e:2x2, or h100"):
        describe(EXPERIMENT, target=target)


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
        assert program.jit("probe", probe)(jax.device_put(1, whole)) == 1
    assert seen == [{}, {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 1}]
