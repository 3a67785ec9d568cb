"""Every mixer over every mesh equals one device: losses, gradients, parameters after five steps. One mesh a mixer is
law 8 (training/laws.py); all of them (`make test-all`) take a quarter of an hour and more."""

import pytest

from recollect.training.laws import MESHES, same_as_on_one_device
from tests.layers.test_mixer_laws import CASES


@pytest.mark.wide
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", [case for case, mixer in CASES.items() if not mixer.traits.cross])
def test_every_mixer_over_every_mesh(case, mesh):
    same_as_on_one_device(CASES[case], MESHES[mesh])
