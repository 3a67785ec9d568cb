"""CAB's patterns: which mixer is in which, and their scores beside each other."""

import math

import pytest

from recollect.data.synthetics import SourceCopying
from recollect.experiments import cab
from recollect.layers import Hyena, Mamba2
from tests.evaluation.folders import write_run


def test_a_mixer_is_where_it_serves():
    experiments = {(one.task, one.name): one for one in cab.patterns().experiments}
    everywhere = {"attention", "differential", "based"}
    recurrent = {"gated_delta_net", "mamba2", "hyena"}
    for task, names in (
        ("noncausal self", everywhere | recurrent),
        ("causal self", everywhere | recurrent),
        ("noncausal cross", everywhere),
        ("causal cross", everywhere),
    ):
        assert {name for of, name in experiments if of == task} == names
        for name in names:
            model = experiments[task, name].model
            assert model.sees_targets == (task == "noncausal self")
            assert (model.encoder is not None) == task.endswith("cross")
    copying = experiments["causal cross", "based"]
    assert isinstance(copying.data, SourceCopying) and copying.model.mixers[-1].traits.cross
    noncausal = [experiments["noncausal self", name].model.mixers[-1] for name in ("mamba2", "hyena")]
    assert [type(mixer) for mixer in noncausal] == [Mamba2, Hyena] and not any(mixer.causal for mixer in noncausal)


def test_rows_have_accuracy_and_the_index_within_the_study(tmp_path):
    runs = {("noncausal self", "attention"): 0.9, ("noncausal self", "mamba2"): 0.5, ("causal cross", "attention"): 0.7}
    for (task, name), accuracy in runs.items():
        for rate, lower in ((3e-3, 0.0), (1e-2, 0.1)):
            write_run(
                tmp_path / task / f"{name}{rate}", name, rate, task=task, accuracy=accuracy - lower, loss=1 - accuracy
            )
    rows = cab.rows([str(tmp_path)])
    assert rows == {
        "attention": {"noncausal self": (0.9, pytest.approx(1)), "causal cross": (0.7, 0)},
        "mamba2": {"noncausal self": (0.5, pytest.approx(-1))},
    }
    assert not any(math.isnan(index) for row in rows.values() for _, index in row.values())
