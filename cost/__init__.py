"""What a model costs before it runs: parameters, memory, FLOPs, compiled for a chip that need not be here."""
