"""Settings shared by all tests: eight fake CPU devices, quick compilation (code runs slower for it, so tests that train
set XLA_FLAGS themselves), shapes checked against annotations, a cache folder that the processes of one test run share,
and a bound on a worker's memory."""

import atexit
import ctypes
import gc
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import pytest

from tests import shape_checks
from tests.quick_compilation import XLA_FLAGS

os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {XLA_FLAGS}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TQDM_DISABLE", "1")
if "RECOLLECT_CACHE" not in os.environ:
    os.environ["RECOLLECT_CACHE"] = tempfile.mkdtemp(prefix="recollect-tests-")
    atexit.register(shutil.rmtree, os.environ["RECOLLECT_CACHE"], ignore_errors=True)
shape_checks.install()

LISTED = {mark: Path(__file__).parent / f"{mark}.txt" for mark in ("more", "wide")}
"""Tests for which `make test`, and those for which `make test-more`, has no time."""
LARGEST_WORKER = 1.4 * 2**30
"""Bytes of resident memory above which a worker drops its compiled programs."""


def resident_memory() -> int:
    """Returns this process's resident bytes; 0 where it cannot be read."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --share, with which N calls run every test once."""
    parser.addoption("--share", default="1/1", metavar="K/N", help="run the Kth of N shares of the tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests that tests/more.txt and tests/wide.txt list (each line begins the names of some), and leaves out
    those of other shares."""
    for mark, path in LISTED.items():
        listed = tuple(line for line in path.read_text().splitlines() if line and not line.startswith("#"))
        for item in items:
            if item.nodeid.removeprefix("tests/").startswith(listed):
                item.add_marker(getattr(pytest.mark, mark))
    number, of = map(int, config.getoption("share").split("/"))
    share: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        share[zlib.crc32(item.nodeid.encode()) % of == number - 1].append(item)
    items[:] = share[True]
    config.hook.pytest_deselected(items=share[False])


def pytest_runtest_teardown() -> None:
    """Keeps a worker under 2 GB: jax never drops a compiled program by itself."""
    if resident_memory() < LARGEST_WORKER or "jax" not in sys.modules:
        return
    sys.modules["jax"].clear_caches()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
