"""Samples of a text model, printed while it trains."""

from __future__ import annotations

from typing import Any

from recollect.configuration import UserError
from recollect.models.functional import Params
from recollect.models.generation import generate
from recollect.models.sampling import Sampling
from recollect.training.batches import Call
from recollect.training.distributed.host import current_host
from recollect.training.hooks import Hook
from recollect.training.run_state import RunState
from recollect.training.step import Program, evaluated


class PrintSamples(Hook):
    """Continues a held-out document each `run.sample_every` steps."""

    def due(self, run: RunState, call: Call) -> bool:
        return call.crosses(run.experiment.run.sample_every)

    def act(self, run: RunState, call: Call) -> None:
        host = current_host()
        params = host.whole(evaluated(run.state))
        if host.is_main:
            run.log("  sample: " + sample(run.program, params, run.progress.step))


def sample(program: Program, params: Params, step: int) -> str:
    """Returns the beginning of a held-out document and its continuation; `step` picks the document."""
    data: Any = program.data
    try:
        prompt = data.prompt(seed=step)
    except UserError as error:
        return str(error)
    tokens = generate(program.model, params, [prompt], 120, Sampling(temperature=0.8, top_p=0.95, seed=step))
    return repr(data.decode(prompt)) + " -> " + repr(data.continuation(prompt, tokens[0]))
