"""What is measured of heads that rest on the first token, beside loops over tokens."""

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.data.synthetics import BigramBackcopy
from recollect.experiments import active_dormant
from recollect.layers import Context
from recollect.models import FunctionalModel, repeat

TASK = BigramBackcopy(length=12, characters=7, triggers=2, extrapolation=())


def test_measures_are_those_of_loops_over_tokens():
    plain = active_dormant.variant("softmax").model
    mixer = plain.stages[0].pattern[0]
    model = FunctionalModel(chz.replace(plain, width=8, stages=repeat(mixer, depth=2)), TASK.vocabulary)
    params = model.init(jax.random.key(1))
    batch = TASK.evaluation_batch(0, 0, None, 3)
    found = jax.device_get(jax.jit(lambda params: active_dormant.measures(model, TASK, params, batch))(params))
    module = model.bind(params)
    tokens, targets = np.asarray(batch.tokens), np.asarray(batch.targets)
    log_shares = np.asarray(jax.nn.log_softmax(module(batch.tokens)))
    triggers, (after, unigram) = set(TASK.trigger_tokens().tolist()), TASK.chain()
    allowed = sum(share for token, share in enumerate(unigram) if token not in triggers)
    risks = {True: [], False: []}
    for row in range(3):
        for at in range(12):
            here, next_ = tokens[row, at], targets[row, at]
            loss = -log_shares[row, at, next_]
            chain = unigram[next_] / allowed if at == 0 else after[here, next_] if here not in triggers else 1.0
            risks[here in triggers].append(loss + np.log(chain))
    assert found["backcopy_risk"] == pytest.approx(np.mean(risks[True]), rel=1e-4)
    assert found["bigram_risk"] == pytest.approx(np.mean(risks[False]), rel=1e-4)

    x = module.enter(batch.tokens, Context())[0]
    for layer, block in enumerate(module.stack.layers()):
        normed = block.mixer_norm(x)
        q, k, v = (np.asarray(of(normed)) for of in (block.mixer.query, block.mixer.key, block.mixer.value))
        weights = []
        for row in range(3):
            for at in range(1, 12):
                scores = k[row, : at + 1] @ q[row, at] / np.sqrt(8)
                if tokens[row, at] not in triggers:
                    weights.append(np.exp(scores[0]) / np.exp(scores).sum())
        assert found["attention"][layer] == pytest.approx(np.mean(weights), rel=1e-4)
        norms = np.sqrt((v**2).sum(-1))
        assert found["value"][layer] == pytest.approx(norms[:, 0].mean() / norms[:, 1:].mean(), rel=1e-4)
        x = x + block.mixer(normed).hidden
        x = x + block.mlp(block.mlp_norm(x))
        norms = np.asarray(jnp.linalg.norm(x, axis=-1))
        assert found["residual"][layer] == pytest.approx(norms[:, 0].mean() / norms[:, 1:].mean(), rel=1e-4)


def test_curves_are_written_and_drawn(tmp_path):
    ones = [active_dormant.Measures(step, 1.0, 0.5, 0.1, 0.9, 1.1) for step in (10, 20)]
    active_dormant.write(tmp_path, {"softmax": ones, "sgd": ones[:1]})
    lines = (tmp_path / "curves.csv").read_text().splitlines()
    assert lines[0] == "variant,step,backcopy_risk,bigram_risk,attention,value,residual"
    assert lines[1:] == [
        "softmax,10,1.0,0.5,0.1,0.9,1.1",
        "softmax,20,1.0,0.5,0.1,0.9,1.1",
        "sgd,10,1.0,0.5,0.1,0.9,1.1",
    ]
    assert (tmp_path / "attention.png").stat().st_size > 1000
    for name in active_dormant.VARIANTS:
        steps = active_dormant.full(name).run.keep_every, active_dormant.variant(name).run.keep_every
        assert steps == (500, 100)
