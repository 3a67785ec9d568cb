"""Times one model of `bench pretraining` and records its row.

python -m recollect.benchmarks.first_contact.pretraining NAME [OVERRIDE ...]
"""

import json
import sys
import tempfile
from pathlib import Path

from recollect.benchmarks import pretraining
from recollect.benchmarks.first_contact import records


def main() -> None:
    name, *overrides = sys.argv[1:]
    records.write("started", what=name)
    with tempfile.TemporaryDirectory() as folder:
        steps = ["--steps", "1" if records.rehearsing() else "3"]
        pretraining.main(["--models", name, *steps, "--out", folder, *overrides])
        (path,) = Path(folder).glob("*/pretraining.json")
        for row in json.loads(path.read_text())["rows"]:
            records.write("pretraining", what=row["name"], overrides=overrides, **row)
    records.write("done")


if __name__ == "__main__":
    main()
