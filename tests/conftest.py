"""Settings shared by all tests: eight fake CPU devices, and quick compilation (most of the suite's time is compiling; the code runs
slower for it, so `make test-slow` sets XLA_FLAGS itself)."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TQDM_DISABLE", "1")
