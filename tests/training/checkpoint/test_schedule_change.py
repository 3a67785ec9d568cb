"""A run that goes on with another number of steps reports what its learning rate does there; and the schedule that it
is advised to, against its definition."""

import json

import pytest

from recollect.main import main
from recollect.training.checkpoint.schedule_change import rate_change
from recollect.training.optimizer import AdamW

TINY = (
    *("data.vocab_size=32", "data.length=16", "data.pairs=2", "data.evaluation_examples=8", "model.width=16"),
    *("run.batch_size=8", "run.steps_per_call=2", "run.compile_cache=off", "optimizer.learning_rate=0.01"),
)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_finished_run_that_goes_on_reports_that_its_rate_rises_again(tmp_path, capsys, schedule):
    train = ["train", "mqar.attention", *TINY, f"optimizer.schedule={schedule}", f"run.directory={tmp_path / 'run'}"]
    assert main([*train, "run.steps=2"]) == 0
    assert "learning rate rises" not in capsys.readouterr().out
    assert "extended" not in json.loads((tmp_path / "run" / "result.json").read_text())
    assert main([*train, "run.steps=4"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["extended"] == {"step": 2, "steps_before": 2}
    lines = [line for line in capsys.readouterr().out.splitlines() if "learning rate rises again" in line]
    assert len(lines) == 1 and "from 0 to 0.005" in lines[0] and "had ended at step 2" in lines[0]
    assert schedule in lines[0] and "optimizer.schedule=wsd (warmup, stable, decay)" in lines[0]


def test_what_the_rate_does_at_the_step_where_a_run_goes_on():
    def change(step, before, now, **settings):
        return rate_change(AdamW(learning_rate=0.01, **settings), step, before, now)

    assert change(100, 100, 200, schedule="constant") is None and change(50, 100, 100) is None
    assert change(80, 100, 200, schedule="wsd") is None, "before its decay a wsd run is the same at both lengths"
    assert "from 0 to 0.01" in change(100, 100, 200, schedule="wsd")
    assert "(step 80)" in change(100, 100, 200, schedule="wsd")
    assert "from 0.001 to 0.0055" in change(100, 100, 200, final_fraction=0.1)
    interrupted = change(50, 100, 200)
    assert "from 0.005 to 0.008536" in interrupted and "was over 100 steps" in interrupted
    assert "falls from 0.005 to 0" in change(50, 100, 50)


@pytest.mark.parametrize(("steps", "warmup", "share", "final"), [(200, 20, 0.2, 0.0), (100, 0, 0.5, 0.1), (7, 2, 1, 0)])
def test_warmup_stable_decay_is_its_definition(steps, warmup, share, final):
    """Hu et al. 2024, section 4.2: a linear rise, a constant part, a fall over the last share of the steps."""
    optimizer = AdamW(schedule="wsd", warmup=warmup, decay_share=share, final_fraction=final)
    begin = steps * (1 - share)
    for step in range(steps + 1):
        rate = 3.0
        if step > begin:
            rate *= 1 - (1 - final) * (step - begin) / (steps - begin)
        if step < warmup:
            rate *= (step + 1) / warmup
        assert float(optimizer.rate(step, steps, 3.0)) == pytest.approx(rate, rel=1e-5, abs=1e-6), step
    assert float(optimizer.rate(steps, steps, 1.0)) == pytest.approx(final)
