"""Compiles the training step of one model of `bench pretraining`, waits for its turn alone on the GPU, and records its
rates.

python -m recollect.benchmarks.first_contact.pretraining NAME [OVERRIDE ...] --gate FILE --seconds N
"""

import argparse
from pathlib import Path

from recollect.benchmarks import pretraining
from recollect.benchmarks.first_contact import child, records
from recollect.configuration import apply_overrides
from recollect.experiments import registry


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--gate", type=Path)
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args()
    experiment = apply_overrides(registry.load(f"pretrain.{options.name}", "experiment"), options.overrides)

    def turn() -> None:
        records.write("ready")
        child.wait(options.gate, options.seconds)
        records.write("started", what=options.name)

    row = pretraining.measure(experiment, 1 if records.rehearsing() else 3, turn)
    records.write("pretraining", what=row["name"], overrides=options.overrides, **row)
    records.write("done")


if __name__ == "__main__":
    main()
