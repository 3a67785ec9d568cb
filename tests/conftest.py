"""Settings shared by all tests: eight fake CPU devices, quick compilation (code runs slower for it, so `make test-slow`
sets XLA_FLAGS itself), and shapes checked against annotations."""

import os

from tests import shape_checks
from tests.quick_compilation import XLA_FLAGS

os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {XLA_FLAGS}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TQDM_DISABLE", "1")
shape_checks.install()
