import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.evaluation.curves import learning_curve, training_curve
from tests.evaluation.folders import write_run


def test_learning_curve_ignores_a_half_written_last_line_only(tmp_path):
    folder = write_run(tmp_path / "a", curve=[(100, 0.25), (200, 0.5)])
    path = folder / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 300, "evalua')
    steps, score, loss, metric = learning_curve(folder)
    assert metric == "accuracy"
    np.testing.assert_array_equal(steps, [100, 200])
    np.testing.assert_array_equal(score, [0.25, 0.5])
    np.testing.assert_array_equal(loss, [0.75, 0.5])
    path.write_text(whole + "\n" + '{"step": 300, "evalua\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 6"):
        learning_curve(folder)
    path.write_text('{"step": 1}\n7\n' + whole)
    with pytest.raises(UserError, match="line 2"):
        learning_curve(folder)


def test_learning_curve_without_evaluations_or_file(tmp_path):
    folder = write_run(tmp_path / "a", curve=[])
    assert [len(part) for part in learning_curve(folder)[:3]] == [0, 0, 0]
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"cannot read .*metrics.jsonl"):
        learning_curve(folder)


def test_training_curve_reads_the_logged_steps(tmp_path):
    folder = write_run(tmp_path / "a", curve=[(100, 0.25), (200, 0.5)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 250, "loss": NaN, "gradient_norm": 1.5, "throughput": {"tokens_per_second": 7}}\n')
    steps, loss, norm, rate = training_curve(folder)
    np.testing.assert_array_equal(steps, [100, 200, 250])
    np.testing.assert_array_equal(loss, [2.0, 2.0, np.nan])
    np.testing.assert_array_equal(norm, [np.nan, np.nan, 1.5])
    np.testing.assert_array_equal(rate, [np.nan, np.nan, 7])
