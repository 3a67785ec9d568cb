"""Settings shared by all tests: eight fake CPU devices, and quick compilation (code runs slower for it, so `make
test-slow` sets XLA_FLAGS itself), and a cache folder of the test run's own, which its processes share."""

import atexit
import os
import shutil
import tempfile

from tests.quick_compilation import XLA_FLAGS

os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {XLA_FLAGS}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TQDM_DISABLE", "1")

if "RECOLLECT_CACHE" not in os.environ:
    os.environ["RECOLLECT_CACHE"] = tempfile.mkdtemp(prefix="recollect-tests-")
    atexit.register(shutil.rmtree, os.environ["RECOLLECT_CACHE"], ignore_errors=True)
