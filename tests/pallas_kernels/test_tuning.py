"""Block sizes: which table entry serves, when the heuristic does, and what measuring writes."""

import json

import jax
import jax.numpy as jnp
import pytest

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.tuning import block_sizes, forced, tables
from recollect.pallas_kernels.tuning import measure as measuring
from recollect.pallas_kernels.tuning.measure import Tunable

H100 = "NVIDIA H100 80GB HBM3"


def reckon(*, k, t, b=1, exact=False):
    return {"chunk": 16}


def entry(chunk, **key):
    return {"key": key, "sizes": {"chunk": chunk}, "milliseconds": 1.0, "jax": jax.__version__, "date": "2026-11-23"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def table(folder):
    entries = [
        entry(32, k=64, t=1024),
        entry(64, k=64, t=4096),
        entry(128, k=128, t=1024),
        entry(256, k=128, t=1024, exact=True),
    ]
    assert tables.write(H100, "op.walk", entries) == folder / "nvidia_h100_80gb_hbm3.json"


def test_without_a_table_the_heuristic_serves(folder):
    assert block_sizes("op.walk", reckon, k=64, t=1024) == {"chunk": 16}


def test_an_entry_serves_its_device_alone(table):
    assert block_sizes("op.walk", reckon, k=64, t=1024) == {"chunk": 16}
    with dispatch.aimed_at("gpu", "NVIDIA H200"):
        assert block_sizes("op.walk", reckon, k=64, t=1024) == {"chunk": 16}
    with dispatch.aimed_at("gpu", H100):
        assert block_sizes("op.walk", reckon, k=64, t=1024) == {"chunk": 32}
        assert block_sizes("op.other", reckon, k=64, t=1024) == {"chunk": 16}


@pytest.mark.parametrize(
    ("key", "chunk"),
    [
        ({"k": 64, "t": 1}, 32),
        ({"k": 64, "t": 2048}, 32),  # as far from 4096: the first of equals
        ({"k": 64, "t": 2049}, 64),
        ({"k": 64, "t": 2**20}, 64),
        ({"k": 128, "t": 4096}, 128),
        ({"k": 96, "t": 1024}, 16),  # head sizes are not rounded
        ({"k": 128, "t": 1024, "exact": True}, 256),
        ({"k": 128, "t": 1024, "exact": False}, 16),
        ({"k": 128, "t": 1024, "exact": 1}, 16),  # not a bool
        ({"k": 64, "t": 1024, "b": 1}, 16),  # an entry without b
    ],
)
def test_the_nearest_count_of_what_is_equal_otherwise(table, key, chunk):
    with dispatch.aimed_at("gpu", H100):
        assert block_sizes("op.walk", reckon, **key) == {"chunk": chunk}


def test_a_table_of_other_sizes_is_an_error(table):
    with (
        dispatch.aimed_at("gpu", H100),
        pytest.raises(ValueError, match=r"op.walk: the table of NVIDIA H100 80GB HBM3 names \['chunk'\]"),
    ):
        block_sizes("op.walk", lambda **key: {"rows": 8}, k=64, t=1024)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps({"device": "NVIDIA H800"}),
        json.dumps({"device": H100, "operations": {"op": [{"key": {}}]}}),
    ],
)
def test_a_damaged_table_is_an_error_that_names_the_file(folder, text):
    tables.path_of(H100).write_text(text)
    with dispatch.aimed_at("gpu", H100), pytest.raises(ValueError, match=r"nvidia_h100_80gb_hbm3\.json is no table"):
        block_sizes("op", reckon, k=64, t=1024)


def test_what_is_returned_is_the_callers(table):
    with dispatch.aimed_at("gpu", H100):
        block_sizes("op.walk", reckon, k=64, t=1024)["chunk"] = 0
        assert block_sizes("op.walk", reckon, k=64, t=1024) == {"chunk": 32}


def test_forced_sizes_come_first_and_trace_jitted_helpers_again():
    seen = []

    @jax.jit
    def helper(x):
        seen.append(block_sizes("op.walk", reckon, k=64, t=1024)["chunk"])
        return x

    for chunk in (1, 2, 1):
        with forced(**{"op.walk": {"chunk": chunk}}):
            helper(jnp.ones(3))
            assert block_sizes("op.another", reckon, k=64, t=1024) == {"chunk": 16}
    helper(jnp.ones(3))
    assert seen == [1, 2, 16]


def test_tables_of_this_repository_can_be_read():
    for path in tables.FOLDER.glob("*.json"):
        device = json.loads(path.read_text())["device"]
        assert tables.path_of(device) == path
        for entries in tables.read(device).values():
            for measured in entries:
                assert measured["milliseconds"] > 0 and measured["date"] and measured["jax"]


def toy(**changes):
    """A kernel whose fastest sizes are known: it repeats its work `passes` times. 3 is wrong, 4 does not trace."""

    def function(x):
        passes = block_sizes("toy.sum", lambda **key: {"passes": 60}, t=len(x))["passes"]
        if passes == 4:
            raise ValueError("4 is too many")
        product = jax.lax.fori_loop(0, passes, lambda i, y: x @ x + 0 * y, x)
        return product * (2 if passes == 3 else 1)

    settings = {
        "kernel": "toy.sum",
        "platform": "gpu",
        "keys": [{"t": 256}],
        "heuristic": lambda **key: {"passes": 60},
        "candidates": lambda key: [{"passes": passes} for passes in (60, 1, 3, 4)],
        "build": lambda key: (function, lambda x: x @ x, (jnp.ones((key["t"], key["t"])),)),
    }
    return Tunable(**{**settings, **changes})


def test_measuring_writes_the_fastest_that_is_right(folder, monkeypatch):
    monkeypatch.setattr(measuring, "ENOUGH", 0.001)
    said = []
    with dispatch.aimed_at("gpu", H100):
        assert measuring.main(["--repeats", "3"], [toy()], said.append) == 0
        (written,) = tables.read(H100)["toy.sum"]
        assert written["key"] == {"t": 256} and written["sizes"] == {"passes": 1}
        assert 0 < written["milliseconds"] < written["heuristic_milliseconds"]
        assert block_sizes("toy.sum", lambda **key: {"passes": 60}, t=100) == {"passes": 1}
    assert any("{'passes': 3}: wrong by" in line for line in said) and any("4 is too many" in line for line in said)


def test_nothing_right_nothing_written(folder):
    with dispatch.aimed_at("gpu", H100):
        assert measuring.main(["toy", "--repeats", "1"], [toy(tolerance=-1.0)], lambda line: None) == 0
        assert list(folder.iterdir()) == []


def test_a_dry_run_writes_nothing(folder, monkeypatch):
    monkeypatch.setattr(measuring, "ENOUGH", 0.001)
    with dispatch.aimed_at("gpu", H100):
        assert measuring.main(["toy.sum", "--dry", "--repeats", "1"], [toy()], lambda line: None) == 0
    assert list(folder.iterdir()) == []


def test_a_cpu_and_unknown_names_are_one_line(folder, capsys):
    assert measuring.main([], [toy()]) == 2
    assert (
        capsys.readouterr().err
        == "error: block sizes are measured on the device they are for; this machine has a CPU only\n"
    )
    with dispatch.aimed_at("gpu", H100):
        assert measuring.main(["tay"], [toy()]) == 2
    assert capsys.readouterr().err == "error: no kernel of this platform is called tay; measurable are: toy.sum\n"
    with dispatch.aimed_at("tpu", "TPU v5 lite"):
        assert measuring.main([], [toy()]) == 2
    assert "measurable are: none" in capsys.readouterr().err


def test_tunables_name_sizes_that_their_kernels_take():
    for tunable in measuring.all_tunables():
        for key in tunable.keys:
            names = tunable.heuristic(**key).keys()
            assert all(sizes.keys() == names for sizes in tunable.candidates(key)), f"{tunable.kernel} {key}"
