"""`bench caches`, at sizes that say nothing."""

import pytest

from recollect.benchmarks import caches
from recollect.configuration import UserError


def test_every_policy_has_a_row(capsys):
    sizes = {"lengths": 80, "budget": 32, "heads": 2, "key-heads": 1, "dim": 4, "steps": 2, "turns": 1}
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    assert caches.main(options) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1] for row in rows] == list(caches.policies(32)) and all(float(row[2]) > 0 for row in rows)
    assert float(rows[0][-1]) == 80 and float(rows[3][-1]) == 32  # full attention reads all


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="--lengths 16: must be above --steps 32"):
        caches.main(["--lengths", "16"])
