"""Settings shared by all tests: eight fake CPU devices, quick compilation (code runs slower for it, so `make test-slow`
sets XLA_FLAGS itself), shapes checked against annotations, and a cache folder that the processes of one test run
share."""

import atexit
import os
import shutil
import tempfile

from tests import shape_checks
from tests.quick_compilation import XLA_FLAGS

os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {XLA_FLAGS}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TQDM_DISABLE", "1")
if "RECOLLECT_CACHE" not in os.environ:
    os.environ["RECOLLECT_CACHE"] = tempfile.mkdtemp(prefix="recollect-tests-")
    atexit.register(shutil.rmtree, os.environ["RECOLLECT_CACHE"], ignore_errors=True)
shape_checks.install()
