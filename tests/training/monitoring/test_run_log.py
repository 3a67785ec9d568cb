"""What metrics.jsonl holds of a run's steps."""

import json

import numpy as np
import pytest

from recollect.training.batches import Call
from recollect.training.monitoring.run_log import Meter, RunLog
from recollect.training.run_state import RunState
from tests.training.tiny import tiny


@pytest.mark.parametrize(
    ("log_every", "steps"), [(50, [20]), (8, [8, 16, 20]), (10, [10, 20]), (3, [*range(3, 20, 3), 20])]
)
def test_steps_on_log_every_and_the_last_are_logged_once(tmp_path, log_every, steps):
    run = RunState(tiny(tmp_path / "run", log_every=log_every), lambda line: None)
    run.meter = Meter(10.0, 1e6)
    log = RunLog(run)
    for end in (10, 20):
        numbers = np.arange(end - 9.0, end + 1)
        metrics = {"loss": numbers, "gradient_norm": numbers, "skipped": np.zeros(10)}
        log.after_call(run, Call(end, 10, metrics, None, 0.0, 0.0, 2.0))
    log.end(run)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [record["loss"] for record in records] == steps
