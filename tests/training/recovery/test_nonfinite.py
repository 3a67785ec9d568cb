"""Steps that are not finite and losses that jump: counted, stopped and kept for replay, or gone back from."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.data.text.rows.by_number import GlobalBatches
from recollect.training.checkpoint.load import load_params
from recollect.training.recovery.loss_spikes import Spikes
from recollect.training.recovery.replay import replay
from recollect.training.sweeps.population import train_members
from recollect.training.train import train
from tests.training.tiny import tiny, tiny_text, write_corpus


class Stop(Exception):
    """Stands for what ends a process."""


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def poison(monkeypatch):
    """poison(numbers, **fields): batches of these numbers get other values in these fields."""
    read = GlobalBatches.read

    def put(numbers, **fields):
        def poisoned(self, number, begin, end):
            batch = read(self, number, begin, end)
            if number not in numbers:
                return batch
            return dataclasses.replace(
                batch, **{name: np.full_like(getattr(batch, name), value) for name, value in fields.items()}
            )

        monkeypatch.setattr(GlobalBatches, "read", poisoned)

    return put


def lines(folder, *names):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: record[name] for name in names if name in record} for record in found]


def params(folder):
    return jax.tree.leaves(load_params(folder / "checkpoints")[0])


def test_a_poisoned_batch_is_skipped_and_counted_once(tmp_path, corpus, poison):
    poison({5, 17}, weights=np.nan)
    result = train(tiny_text(tmp_path / "run", corpus), log=lambda text: None)
    assert (result["status"], result["skipped_steps"], result["steps"]) == ("finished", 2, 24)
    skipped = [record["step"] for record in lines(tmp_path / "run", "step", "skipped") if record.get("skipped")]
    assert skipped == [6, 18]
    assert all(np.isfinite(leaf).all() for leaf in params(tmp_path / "run"))


@pytest.mark.parametrize("first", [9, 11])
def test_too_many_in_a_row_end_the_run_with_what_reproduces_them(tmp_path, corpus, poison, first):
    poison({3, first, first + 1, first + 2}, weights=np.nan)
    said = []
    result = train(tiny_text(tmp_path / "run", corpus), log=said.append)
    assert (result["status"], result["skipped_steps"]) == ("diverged", 4)
    assert result["failure"]["step"] == first + 3 and "weights" in result["failure"]["found"]
    assert any(f" replay {result['failure']['folder']}" in line for line in said)
    found = []
    assert replay(result["failure"]["folder"], found.append)
    assert any(line.startswith("reproduced") for line in found)
    again = []
    assert train(tiny_text(tmp_path / "run", corpus), log=again.append)["status"] == "diverged"
    assert "already finished" in again[-1]


def test_members_of_a_population_diverge_alone(tmp_path):
    # Adam's first steps are as long as the learning rate: one of 1e38 leaves no finite parameter.
    rates = [1e-2, 1e38]
    members = [tiny(tmp_path / str(rate), learning_rate=rate) for rate in rates]
    results = train_members(members, together=True, log=lambda text: None)
    assert [result["status"] for result in results] == ["finished", "diverged"]
    assert results[0]["steps"] == 60 and results[1]["skipped_steps"] == 3
    assert replay(results[1]["failure"]["folder"], lambda text: None)
    assert results[0]["skipped_steps"] == 0 and np.isfinite(results[0]["loss"])


def test_a_spike_sends_the_run_back_past_its_data_and_a_kill_changes_nothing(tmp_path, corpus, poison):
    poison({13}, targets=0)
    spikes = Spikes(window=5, threshold=10.0, warmup=10)
    said = []
    result = train(tiny_text(tmp_path / "whole", corpus, spikes=spikes), log=said.append)
    assert (result["status"], result["rollbacks"], result["steps"]) == ("finished", 1, 24)
    assert any("step 14: the loss jumped" in line for line in said) and any(
        "resumed at step 8" in line for line in said
    )
    assert any("6 batches after step 8 are left out" in line for line in said)
    extra = json.loads((tmp_path / "whole" / "checkpoints" / "24" / "meta.json").read_text())["extra"]
    assert extra["data_state"]["offset"] == 6
    calm = train(tiny_text(tmp_path / "calm", corpus), log=lambda text: None)
    assert "rollbacks" not in calm and max(record.get("loss", 0) for record in lines(tmp_path / "calm", "loss")) > 5
    assert [record["step"] for record in lines(tmp_path / "whole", "step")] == [
        record["step"] for record in lines(tmp_path / "calm", "step")
    ]
    for word in ("left out", "step 24"):
        cut = tmp_path / word.replace(" ", "_")

        def say(line, word=word):
            if word in line:
                raise Stop

        with pytest.raises(Stop):
            train(tiny_text(cut, corpus, spikes=spikes), log=say)
        again = train(tiny_text(cut, corpus, spikes=spikes), log=lambda text: None)
        assert again["rollbacks"] == 1
        for one, two in zip(params(tmp_path / "whole"), params(cut), strict=True):
            np.testing.assert_array_equal(one, two)
        assert lines(tmp_path / "whole", "step", "loss", "gradient_norm") == lines(cut, "step", "loss", "gradient_norm")


def test_recall_has_no_data_to_leave_out(tmp_path):
    with pytest.raises(UserError, match="a recall task's batches are drawn anew"):
        train(tiny(tmp_path / "run", spikes=Spikes()), log=lambda text: None)
    assert not (tmp_path / "run").exists()
