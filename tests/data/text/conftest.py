"""A cache folder of its own for every test, and a small corpus of random documents."""

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RECOLLECT_CACHE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path):
    """60 files of random ASCII, 1 to 900 bytes each: no eight bytes stand in two of them."""
    random = np.random.default_rng(0)
    root = tmp_path / "corpus"
    (root / "inner").mkdir(parents=True)
    for index in range(60):
        size = int(random.integers(1, 900))
        name = f"inner/{index}.txt" if index % 2 else f"{index}.md"
        (root / name).write_bytes(random.integers(32, 127, size, np.uint8).tobytes())
    return root
