"""A script for tests of text over several processes: a few steps, an evaluation and a sample, as one line of JSON."""

import argparse
import json
import sys

import numpy as np

from recollect.training.distributed.host import joined
from recollect.training.saved_experiment import experiment_from_json


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("experiment", help="a file of the experiment as JSON")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    given = parser.parse_args()
    with joined(given.coordinator, given.processes, given.process), open(given.experiment) as file:
        print("found " + json.dumps(few_steps(experiment_from_json(json.load(file), given.experiment))), flush=True)


def few_steps(experiment) -> dict:
    """Losses of four steps (two calls and a skipped batch between), held-out bits per byte, and rows that this process
    read."""
    from recollect.training.batches import open_batches
    from recollect.training.evaluator import evaluate
    from recollect.training.host_batches import local_rows
    from recollect.training.monitoring.samples import sample
    from recollect.training.step import member_values, program_for

    program = program_for(experiment)
    feed = open_batches(experiment, program)
    state, values = program.init(0), member_values([experiment], False)
    losses = []
    for step in (0, 2):
        for place in range(0, 2, length := feed.steps_ahead(step, 2)):
            state, metrics = feed.train(state, values, length, step + place)
            losses += np.asarray(metrics["loss"]).tolist()
        feed.skip(1)
    found = evaluate(program, state["params"], 0)
    rows = local_rows(feed.batches.rows(0), feed.batches.row_length(0), program.mesh)
    return {
        "losses": losses,
        "bits": found["bits_per_byte"],
        "rows": rows,
        "sample": sample(program, state["params"], 1),
    }


if __name__ == "__main__":
    sys.exit(main())
