"""Flags of XLA under which programs for a CPU compile in a third of the time. Most of the tests' time is compiling;
the code runs slower for it."""

XLA_FLAGS = " ".join(
    [
        "--xla_backend_optimization_level=0",
        # The older emitters of fused loops; jax 0.10 and 0.11 know this spelling.
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
        # Two cores gain nothing from a program split into 32 parts.
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)
