"""Spikes are seen, trends and noise are not, and the guard's state is all there is to it."""

import json
import math
import random

import pytest

from recollect.configuration import UserError
from recollect.training.recovery.loss_spikes import LossSpikeDetector, Spikes


def falling(count, seed=0, noise=0.05):
    """A loss that falls from 8 towards 3, with noise."""
    chance = random.Random(seed)
    return [3 + 5 * math.exp(-step / 200) + chance.gauss(0, noise) for step in range(count)]


def test_a_falling_noisy_loss_has_no_spike_and_a_jump_is_one():
    for seed in range(5):
        guard = LossSpikeDetector(Spikes())
        losses = falling(1000, seed)
        assert not any(guard.observe(step, loss) for step, loss in enumerate(losses))
        assert not guard.observe(1000, losses[-1] + 0.2)
        assert guard.observe(1001, losses[-1] + 2.0)


def test_a_steady_loss_may_move_a_little():
    guard = LossSpikeDetector(Spikes(window=10, warmup=0))
    assert not any(guard.observe(step, 2.0) for step in range(10))
    assert guard.limit() == pytest.approx(2.2)  # no deviation at all: 10 times 1% of the median
    assert not guard.observe(10, 2.19) and guard.observe(11, 2.25)


def test_an_earlier_spike_does_not_hide_the_next():
    guard = LossSpikeDetector(Spikes(most=2))
    losses = falling(400)
    losses[300], losses[310] = 30.0, 9.0
    assert [step for step, loss in enumerate(losses) if guard.observe(step, loss)] == [300, 310]
    assert guard.rollbacks == 2 and not guard.observe(400, 50.0), "no more than `most`"


def test_none_warmup_and_losses_that_are_not_finite():
    guard = LossSpikeDetector(Spikes(window=5, warmup=20))
    assert not any(guard.observe(step, 1.0 if step < 19 else 100.0) for step in range(20))
    guard = LossSpikeDetector(Spikes(window=5, warmup=0))
    assert not any(guard.observe(step, 1.0) for step in range(5))
    assert not guard.observe(5, math.nan) and not guard.observe(6, math.inf) and guard.observe(7, 100.0)


def test_steps_done_again_replace_the_old_ones():
    """A guard rolled back to step 60, and one that never saw steps 60 on, judge alike."""
    config = Spikes(window=20, warmup=0)
    one, two = LossSpikeDetector(config), LossSpikeDetector(config)
    losses = falling(100)
    for step, loss in enumerate(losses[:80]):
        one.observe(step, loss)
        if 60 - config.window <= step < 60:
            two.observe(step, loss)
    for step in range(60, 80):
        one.observe(step, losses[step] + 0.1)
        two.observe(step, losses[step] + 0.1)
    assert one.state() == two.state() and one.limit() == two.limit()


def test_its_state_travels_through_json():
    config = Spikes(window=30)
    whole, first, second = LossSpikeDetector(config), LossSpikeDetector(config), LossSpikeDetector(config)
    losses = falling(300)
    losses[200] = 20.0
    found = [whole.observe(step, loss) for step, loss in enumerate(losses)]
    half = [first.observe(step, loss) for step, loss in enumerate(losses[:150])]
    second.set_state(json.loads(json.dumps(first.state())))
    half += [second.observe(step, loss) for step, loss in enumerate(losses[150:], start=150)]
    assert half == found and any(found) and second.state() == whole.state()
    second.set_state(None)
    assert second.state() == LossSpikeDetector(config).state()


@pytest.mark.parametrize(("field", "value"), [("window", 4), ("threshold", 0.5), ("warmup", -1), ("most", -1)])
def test_impossible_settings(field, value):
    with pytest.raises(UserError, match=f"spikes.{field}={value}"):
        Spikes(**{field: value})
