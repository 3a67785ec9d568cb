"""Writing, verifying, loading and resuming from checkpoints."""
