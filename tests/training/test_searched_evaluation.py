"""`evaluate --streamed --infini-retri`: a context that fits one window is streamed as without it, and what a search
holds and reads is counted."""

import chz
import jax
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.data.synthetics import MQAR, ruler
from recollect.layers import Attention, BaseConvolution
from recollect.main import main
from recollect.models import LanguageModel, repeat, state_bytes_at
from recollect.training.experiment import Experiment, Run
from recollect.training.searched_evaluation import Search, evaluate_searched
from recollect.training.step import program_for
from recollect.training.streamed_evaluation import evaluate_streamed

LENGTH, PREFILL = 32, 29
EXPERIMENT = Experiment(
    name="searched",
    model=LanguageModel(width=16, stages=repeat(BaseConvolution(kernel=3), Attention(heads=2), depth=2)),
    data=ruler("passkey", length=LENGTH, value_tokens=2, extrapolation=(), evaluation_examples=8),
    run=chz.replace(Run(), batch_size=8),
)


@pytest.fixture(scope="module")
def params():
    return program_for(EXPERIMENT).model.init(jax.random.key(0))


def test_one_window_is_the_streamed_model(params):
    searched = evaluate_searched(EXPERIMENT, params, PREFILL, Search(window=PREFILL, question=2))
    streamed = evaluate_streamed(EXPERIMENT, params, PREFILL)
    np.testing.assert_allclose(searched.pop("loss"), streamed.pop("loss"), rtol=1e-5)
    for name in ("accuracy", "state_bytes", "keys_read"):
        assert searched[name] == streamed[name]


def test_ids_held_and_keys_read_in_the_search_are_counted(params):
    search = Search(window=12, top=1, phrase=1, budget=4, sentence=4, question=2)
    searched = evaluate_searched(EXPERIMENT, params, PREFILL, search)
    # Windows of 12, 12 and 5 tokens, the first without kept ones; a question of 2 tokens reads them and its own. Four
    # tokens are kept but where the last sentence, of one token, is; the question and an answer are read after them.
    least = 1.5 + 12 + 1.5 + 16 + 1.5 + 9
    assert 2 * least / 3 + 3 < searched["keys_read"] <= 2 * least / 3 + (5 + 6 + 7) / 3
    slots = search.budget + LENGTH - PREFILL
    behind = state_bytes_at(EXPERIMENT.model, EXPERIMENT.data.vocabulary, [slots])[str(slots)]
    assert searched["state_bytes"] == {"32": behind + 4 * (4 + 4 + 1)}  # two ids and whether it is one, per token


def test_what_cannot_be_searched_is_refused(params, tmp_path, capsys):
    with pytest.raises(UserError, match="question=3: in slice 32 token 30 is to be answered already"):
        evaluate_searched(EXPERIMENT, params, PREFILL, Search(question=3))
    with pytest.raises(UserError, match="is to be answered already"):
        evaluate_searched(chz.replace(EXPERIMENT, data=MQAR(vocab_size=32, length=16, pairs=2)), params, 8, Search())
    assert main(["evaluate", str(tmp_path), "--streamed", "--infini-retri", "top=4"]) == 2
    assert "--infini-retri searches the context that a question is about" in capsys.readouterr().err
